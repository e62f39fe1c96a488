"""Text in, scores out: synchronous, without the web stack, usable alone."""

import os

# A thread that waits for another sleeps instead of spinning. Alone it makes no clear difference; beside one busy
# process a request takes 7 s instead of 10, and 7 s of processor time instead of 13 (benchmarks/breakdown.py). OpenMP
# reads it when torch is loaded: whoever imports torch before this package sets it himself.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
