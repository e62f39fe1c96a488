"""From logits to relevance scores; free of torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from reranker.types import Chunk, EncodedRequest


def per_document(request: EncodedRequest, logits: Sequence[float]) -> tuple[list[float], dict[int, Chunk]]:
    """Logits of what was scored -> one logit per document, and the best chunk of each document that was split.

    The best chunk is the one with the highest logit, the first of equals. `logits` are finite.
    """
    if request.chunks is None:
        return list(logits), {}
    best: list[float] = []
    chunks: dict[int, Chunk] = {}
    start = 0
    for i, borders in enumerate(request.chunks):
        own = logits[start : start + len(borders) - 1]
        start += len(own)
        best.append(max(own))
        if len(own) > 1:
            spans = list(itertools.pairwise(borders))
            chunks[i] = Chunk(own.index(best[-1]), *spans[own.index(best[-1])])
    return best, chunks


def sigmoid(logit: float) -> float:
    """The probability of "yes": the card's softmax over the two logits equals this of their difference."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
