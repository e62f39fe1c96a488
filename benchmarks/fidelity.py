"""How near the engine is to the model card: largest difference of the logits, one pair at a time in float32.

    python -m benchmarks.fidelity [--shape mid] [--requests 8]

For float32, bfloat16 and float16; and how far a logit moves when other requests share the batch.
"""

from __future__ import annotations

import argparse
import itertools

from benchmarks.card import Card
from benchmarks.models import SHAPES, model
from benchmarks.report import header, table
from benchmarks.workloads import read
from reranker import Scorer
from reranker.engine.budget import split
from reranker.types import EncodedRequest, RerankRequest, Slice


def alone(scorer: Scorer, encoded: EncodedRequest) -> list[float]:
    """Logits of a request that shares its batches with no other."""
    return [x for s in split(encoded, scorer.max_batch_tokens, 10**9) for x in scorer.score(scorer.pack([s]))]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--workload", default="short", help="short or long")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--half-requests", type=int, default=2, help="the same for the 16-bit types, slow on most CPUs")
    a = parser.parse_args()
    path = model(a.shape)
    work = read(a.workload, a.requests)
    card = Card(path)
    wanted = [card.logits(request["query"], request["documents"], batch=1) for request in work]
    spread = max(itertools.chain(*wanted)) - min(itertools.chain(*wanted))

    rows = []
    for precision in ("float32", "bfloat16", "float16"):
        scorer = Scorer.load(path, device="cpu", precision=precision)
        some = work if precision == "float32" else work[: a.half_requests]
        encoded = [scorer.encode(RerankRequest(request["query"], request["documents"])) for request in some]
        single = [alone(scorer, e) for e in encoded]
        # Batches that hold a few documents of every request.
        mixed: list[list[float]] = [[] for _ in encoded]
        longest = max(len(e.documents) for e in encoded)
        for start in range(0, longest, 4):
            parts = [Slice(e, start, min(start + 4, len(e.documents))) for e in encoded if start < len(e.documents)]
            flat = iter(scorer.score(scorer.pack(parts)))
            for part in parts:
                mixed[encoded.index(part.request)] += [next(flat) for _ in range(part.stop - part.start)]
        reference = wanted[: len(some)]
        figures = (_worst(single, reference), _worst(mixed, reference), _worst(mixed, single))
        rows.append([precision, str(sum(map(len, single))), *(f"{figure:.1e}" for figure in figures)])
    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights), {a.workload}.json; the card's logits (float32)")
    print(f"spread over {spread:.2f}. Largest absolute difference of a logit:\n")
    print(
        table(
            ["precision", "documents", "from the card, alone", "from the card, shared batches", "shared from alone"],
            rows,
        )
    )


def _worst(got: list[list[float]], wanted: list[list[float]]) -> float:
    return max(abs(g - w) for g, w in zip(itertools.chain(*got), itertools.chain(*wanted), strict=True))


if __name__ == "__main__":
    main()
