"""Layers compiled by torch's compiler on a CPU against the engine's own: seconds of a pass on one thread.

    python -m studies.compiled [--shape mid] [--documents 8] [--rounds 5]

The rule is that of a GPU (engine/acceleration.py): equal hidden states, and not slower. Both with the product that the
engine chose at load and, since the compiler may pack float32 products itself, with torch's own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.models import MODELS, model
from benchmarks.report import header, table
from benchmarks.workloads import read
from reranker import Scorer
from reranker.engine import linear
from reranker.engine.acceleration import compile_layer_fns, differs
from reranker.engine.batch import pack
from reranker.engine.checkpoint.files import first_line
from reranker.types import RerankRequest, Slice


def main() -> None:
    """Print a table of both products."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="mid")
    parser.add_argument("--documents", type=int, default=8, help="of one request of short.json, in one pass")
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    torch.set_num_threads(1)
    path, rows, tokens = model(a.shape), [], 0
    request = RerankRequest(*(read("short", 1, a.documents)[0][field] for field in ("query", "documents")))
    for product, least in (("chosen at load", linear.MIN_WEIGHTS), ("torch's own", 1 << 62)):
        linear.MIN_WEIGHTS = least  # a model below it keeps torch's own
        scorer = Scorer.load(path, device="cpu", precision="float32")
        encoded = scorer.encode(request)
        batch = pack([Slice(encoded, 0, encoded.count)], static_prefix_len=len(scorer.model.static_prefix))
        tokens, fused = batch.tokens, compile_layer_fns(scorer.model.backbone.eager)

        def eager(scorer: Scorer = scorer) -> Tensor:
            return scorer.model.hidden(batch)  # noqa: B023  (used in this turn only)

        def compiled(scorer: Scorer = scorer) -> Tensor:
            return scorer.model.hidden(batch, fused)  # noqa: B023

        begun = time.perf_counter()
        try:
            different = differs(compiled, eager, 1e-4)
        except Exception as error:  # the compiler's own, of many types
            rows.append([product, "-", "-", "-", f"{type(error).__name__}: {first_line(error)}"])
            continue
        ready = time.perf_counter() - begun
        seconds: dict[Callable[[], Tensor], list[float]] = {eager: [], compiled: []}
        for _ in range(a.rounds):
            for run in seconds:
                start = time.thread_time()
                run()
                seconds[run].append(time.thread_time() - start)
        each = [statistics.median(seconds[run]) for run in (eager, compiled)]
        rows.append([product, *(f"{1000 * x:.0f}" for x in each), f"{each[0] / each[1]:.2f}"])
        rows[-1].append(different or f"equal, ready after {ready:.0f} s")
    print(header(), end="\n\n")
    of = f"a pass of {tokens} tokens; {a.rounds} rounds, median"
    print(f"Model {a.shape} (random weights, float32), one thread, {of}.", end="\n\n")
    print(table(["product", "eager, ms", "compiled, ms", "times as fast", "result"], rows))


if __name__ == "__main__":
    main()
