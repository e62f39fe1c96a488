"""Texts in, scores out: synchronous, without the web stack, usable alone."""

import os

# A waiting thread sleeps instead of spinning. Without other load this changes little; beside one busy process a request
# takes 7 s instead of 10, and 7 s of processor time instead of 13 (studies/breakdown.py). OpenMP reads the variable
# when torch is loaded, so a program that imports torch before this package must set it itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
