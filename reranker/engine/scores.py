"""Turn logits into relevance scores; free of torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from reranker.types import Chunk, DocumentScore, EncodedRequest


def per_document(request: EncodedRequest, logits: Sequence[float]) -> list[DocumentScore]:
    """Turn the logits of a request's documents or chunks into one score per document.

    The best chunk is the one with the highest logit, the first of equals. `logits` must be finite.
    """
    prefix = len(request.prefix)
    if request.chunks is None:
        return [
            DocumentScore(logit, prefix + len(document), i in request.truncated, None, request.query_truncated)
            for i, (logit, document) in enumerate(zip(logits, request.documents, strict=True))
        ]
    scores: list[DocumentScore] = []
    start = 0
    for i, borders in enumerate(request.chunks):
        stop = start + len(borders) - 1
        tokens = prefix * (stop - start) + sum(map(len, request.documents[start:stop]))
        best = max(range(stop - start), key=logits[start:stop].__getitem__)
        chunk = Chunk(best, *borders[best : best + 2]) if stop - start > 1 else None
        truncated = i in request.truncated
        scores.append(DocumentScore(logits[start + best], tokens, truncated, chunk, request.query_truncated))
        start = stop
    return scores


def sigmoid(logit: float) -> float:
    """Turn a logit into a probability without overflow."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
