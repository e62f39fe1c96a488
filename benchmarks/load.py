"""Seconds of loading a checkpoint for each GB that is stored, by precision; without warm-up.

    python -m benchmarks.load [--shape 0.6b] [--rounds 3] [--threads 2]

The checkpoint has random weights in bfloat16 and is in the page cache: the disk is not measured.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch

from benchmarks.models import SHAPES, model
from benchmarks.report import header, table
from reranker.engine.checkpoint.locate import Located
from reranker.engine.families import open_checkpoint
from reranker.engine.model import load
from reranker.engine.precision import short

CPU = torch.device("cpu")


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.6b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    path = model(a.shape, dtype=torch.bfloat16)
    family = open_checkpoint(Located(path))
    size = sum(file.stat().st_size for file in path.glob("*.safetensors")) / 1e9
    for file in path.glob("*.safetensors"):
        file.read_bytes()
    rows = []
    for precision in (torch.bfloat16, torch.float32, torch.int8):
        times = []
        for _ in range(a.rounds):
            gc.collect()
            start = time.perf_counter()
            load(family, CPU, precision, 90)
            times.append(time.perf_counter() - start)
        middle = statistics.median(times)
        rows.append([short(precision), f"{middle:.1f}", f"{middle / size:.1f}", f"{min(times) / size:.1f}"])
    print(f"{header()}\n\nA checkpoint of {size:.2f} GB in bfloat16 ({a.shape}), {a.rounds} loads each:\n")
    print(table(["precision", "median, s", "median, s a GB", "best, s a GB"], rows))


if __name__ == "__main__":
    main()
