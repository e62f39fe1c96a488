"""Texts in, scores out: synchronous, without the web stack, usable alone."""

import os

# OpenMP threads sleep while they wait and do not spin. Alone this makes no clear difference; beside one busy process a
# request takes 7 s, not 10, and 7 s of CPU time, not 13 (benchmarks/breakdown.py). OpenMP reads it when torch is
# loaded: a program that imports torch first must set it itself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
