"""How time and memory grow with the request: 10 to 10,000 documents, 20 to 8,000 tokens each; a table and a plot.

    python -m studies.growth [--shape mid] [--device cpu] [--threads 1] [--tokens 16000] [--plot PNG]

Time per packed token should stay flat with the number of documents, and nearly so with their length, where attention
grows (each token attends to half of its document, on average); peak memory should stay flat in both, because a forward
pass is bounded by the token budget. Peak memory is that of the process until then; on a GPU, the maximum allocated.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

from benchmarks.models import SHAPES, model
from benchmarks.report import header, table
from reranker import Scorer
from reranker.engine.budget import split
from reranker.types import EncodedRequest

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PREFIX = 80
COUNTS = (10, 100, 1000, 10_000)
LENGTHS = (20, 50, 100, 200, 500, 1000, 2000, 4000, 8000)


@dataclass(frozen=True)
class Point:
    """One measured request."""

    documents: int
    length: int
    tokens: int
    microseconds_per_token: float
    peak_bytes: int


def main() -> None:
    """Measure, print a table, draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=16_000, help="tokens of the requests of growing document length")
    parser.add_argument("--plot", type=Path, help="where to draw the picture; none without it")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    scorer = Scorer.load(model(a.shape), device=a.device)
    _measure(scorer, 100, 100)  # the first passes are not counted
    counts = [_measure(scorer, count, 20) for count in COUNTS]
    lengths = [_measure(scorer, max(2, a.tokens // length), length) for length in LENGTHS]

    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights, {scorer.info.precision}), {a.device}; the budget chosen at warm-up is")
    print(f"{scorer.max_batch_tokens} tokens a pass; prefix {PREFIX} tokens.\n")
    head = ["documents", "tokens each", "packed tokens", "microseconds a token", "peak memory, GiB"]
    print(
        table(
            head,
            [
                [
                    f"{p.documents:,}",
                    f"{p.length:,}",
                    f"{p.tokens:,}",
                    f"{p.microseconds_per_token:.0f}",
                    f"{p.peak_bytes / 2**30:.2f}",
                ]
                for p in counts + lengths
            ],
        )
    )
    if a.plot:
        _draw(counts, lengths, a.plot)


def _measure(scorer: Scorer, documents: int, length: int) -> Point:
    source = torch.Generator().manual_seed(length)
    vocabulary = scorer.model.backbone.vocab_size
    words = torch.randint(100, vocabulary, (documents, length), generator=source).tolist()
    request = EncodedRequest(words[0][:1] * PREFIX, words)
    start, tokens = time.perf_counter(), 0
    for part in split(request, scorer.max_batch_tokens, scorer.max_batch_documents):
        batch = scorer.pack([part])
        scorer.score(batch)
        tokens += batch.tokens
    seconds = time.perf_counter() - start
    if scorer.model.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Point(documents, length, tokens, seconds / tokens * 1e6, peak)


def _draw(counts: list[Point], lengths: list[Point], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    series = (
        (axes[0], counts, [p.documents for p in counts], "documents of 20 tokens"),
        (axes[1], lengths, [p.length for p in lengths], "tokens a document"),
    )
    for axis, points, x, label in series:
        axis.plot(x, [p.microseconds_per_token for p in points], "o-", color="tab:blue")
        axis.set(xscale="log", xlabel=label, ylim=(0, None))
        memory = axis.twinx()
        memory.plot(x, [p.peak_bytes / 2**30 for p in points], "s--", color="tab:gray")
        memory.set(ylim=(0, 1.3 * max(p.peak_bytes for p in counts + lengths) / 2**30))
        memory.set_ylabel("peak memory, GiB (dashed)")
    axes[0].set_ylabel("microseconds a packed token")
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
