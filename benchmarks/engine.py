"""The engine against the model card's own code, side by side in one run: documents per second.

    python -m benchmarks.engine [--shape mid] [--requests 2] [--rounds 3] [--threads 1]

The contestants take turns inside every round, so that a busy machine slows all of them alike; wall time and processor
time are reported, and the ratios come from the medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.card import Card
from benchmarks.models import SHAPES, model
from benchmarks.report import header, table
from reranker import Scorer

Work = list[dict[str, object]]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--workload", default="short", help="short or long")
    parser.add_argument("--requests", type=int, default=2, help="requests of the workload to use")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    path = model(a.shape)
    work = json.loads((Path(__file__).parent / f"{a.workload}.json").read_text(encoding="utf-8"))[: a.requests]
    documents = sum(len(request["documents"]) for request in work)

    scorer, card = Scorer.load(path, device="cpu", precision="float32"), Card(path)
    contestants: dict[str, Callable[[str, list[str]], object]] = {
        "this engine": scorer.rerank,
        "card, 1 pair, last position": lambda q, d: card.logits(q, d, batch=1),
        "card, batch 8, last position": lambda q, d: card.logits(q, d, batch=8),
        "card, batch 32, last position": lambda q, d: card.logits(q, d, batch=32),
        "card as printed, batch 8": lambda q, d: card.logits(q, d, batch=8, all_positions=True),
    }
    wall: dict[str, list[float]] = {name: [] for name in contestants}
    processor: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():  # the first pass of each is not counted
        run(work[0]["query"], work[0]["documents"][:8])
    for _ in range(a.rounds):
        for name, run in contestants.items():
            start, used = time.perf_counter(), time.process_time()
            for request in work:
                run(request["query"], request["documents"])
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - used)

    rate = {name: documents / statistics.median(wall[name]) for name in contestants}
    used_by = {name: statistics.median(processor[name]) for name in contestants}
    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights, float32), {a.workload}.json, {len(work)} requests, {documents} documents,")
    print(f"{a.rounds} rounds, median. Token budget {scorer.max_batch_tokens}.\n")
    rows = [
        [
            name,
            f"{rate[name]:.2f}",
            f"{used_by[name]:.1f}",
            f"{rate['this engine'] / rate[name]:.2f}",
            f"{used_by[name] / used_by['this engine']:.2f}",
        ]
        for name in contestants
    ]
    print(table(["contestant", "documents/s", "CPU s", "ours is faster, wall", "ours is faster, CPU s"], rows))
    best = max(rate[name] for name in contestants if "last position" in name)
    print(f"\nAgainst the card at its best batch size: {rate['this engine'] / best:.2f} times;")
    print(f"against the card as printed: {rate['this engine'] / rate['card as printed, batch 8']:.2f} times (wall).")


if __name__ == "__main__":
    main()
