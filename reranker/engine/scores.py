"""From logits to relevance scores; free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reranker.types import Chunk, DocumentScore, EncodedRequest


def per_document(request: EncodedRequest, logits: Sequence[float]) -> list[DocumentScore]:
    """Logits of what was scored -> what each document got.

    The best chunk is the one with the highest logit, the first of equals. `logits` are finite.
    """
    scores: list[DocumentScore] = []
    start = 0
    for i in range(request.count):
        borders = [0, 0] if request.chunks is None else request.chunks[i]
        stop = start + len(borders) - 1
        tokens = len(request.prefix) * (stop - start) + sum(map(len, request.documents[start:stop]))
        place = max(range(stop - start), key=logits[start:stop].__getitem__)
        chunk = Chunk(place, *borders[place : place + 2]) if stop - start > 1 else None
        scores.append(DocumentScore(logits[start + place], tokens, i in request.truncated, chunk))
        start = stop
    return scores


def sigmoid(logit: float) -> float:
    """The probability of "yes": the card's softmax over the two logits equals this of their difference."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
