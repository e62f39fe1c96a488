"""Text in, scores out: synchronous, without the web stack, usable alone."""

import os

# A thread that waits for another sleeps instead of spinning: less processor time for the same scores, and much less
# waiting beside another busy process (benchmarks/breakdown.py). OpenMP reads it when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
