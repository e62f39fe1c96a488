"""A CPU's products by turns: torch's over all rows, torch's and oneDNN's in blocks of rows, 16-bit weights, bfloat16.

    python -m benchmarks.products [--shape mid] [--documents 1 4 30] [--rounds 5]

One thread, as in a lane; seconds of the processor, as ratios to torch's float32 over all rows of a pass.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from unittest import mock

import torch

from benchmarks.models import SHAPES, model
from benchmarks.report import header, table
from benchmarks.workloads import read
from reranker.engine import linear
from reranker.engine.scorer import Scorer
from reranker.types import RerankRequest, Slice

WAYS = {  # name -> precision, gain from which oneDNN is used, rows of a block
    "float32, torch, all rows": ("float32", float("inf"), 1 << 20),
    "float32, torch": ("float32", float("inf"), linear.BLOCK_ROWS),
    "float32, oneDNN, all rows": ("float32", 0.0, 1 << 20),
    "float32, oneDNN": ("float32", 0.0, linear.BLOCK_ROWS),
    "float32-w16, oneDNN": ("float32-w16", 0.0, linear.BLOCK_ROWS),
    "bfloat16": ("bfloat16", 0.0, linear.BLOCK_ROWS),
}


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--documents", type=int, nargs="+", default=[1, 4, 30])
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # random weights fail the self-check
    path, scorers = model(a.shape, dtype=torch.bfloat16), dict[tuple[str, float], Scorer]()
    for precision, gain, _ in WAYS.values():
        if (precision, gain) not in scorers:
            with mock.patch.object(linear, "_MIN_GAIN", gain):
                scorers[precision, gain] = Scorer.load(path, device="cpu", precision=precision)
    [row] = read("short", 1, max(a.documents))
    print(header(), end="\n\n")
    rows = []
    for documents in a.documents:
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        logits: dict[str, list[float]] = {}
        for _ in range(a.rounds + 1):  # the first round is cold
            for name, (precision, gain, block) in WAYS.items():
                scorer = scorers[precision, gain]
                request = scorer.encode(RerankRequest(row["query"], row["documents"][:documents]))
                batch = scorer.pack([Slice(request, 0, documents)])
                with mock.patch.object(linear, "BLOCK_ROWS", block):
                    start = time.thread_time()
                    logits[name] = scorer.score(batch)
                    seconds[name].append(time.thread_time() - start)
        base = next(iter(WAYS))
        for name in WAYS:
            ratios = [x / y for x, y in zip(seconds[base][1:], seconds[name][1:], strict=True)]
            apart = max(abs(x - y) for x, y in zip(logits[base], logits[name], strict=True))
            rows.append([str(batch.tokens), name, f"{statistics.median(ratios):.2f}", f"{apart:.1e}"])
    print(table(["tokens", f"{a.shape}, one thread", "times as fast", "largest difference of a logit"], rows))


if __name__ == "__main__":
    main()
