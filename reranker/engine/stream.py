"""Score a long stream of requests: forward passes are shared between requests and always full.

The offline counterpart of the service's batcher. Requests keep their order; a thread tokenises and packs the next pass
during the current one.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from reranker.engine.budget import full_batches
from reranker.engine.scorer import NOT_A_NUMBER, Batch, Scorer
from reranker.engine.scores import per_document
from reranker.errors import RerankError, ScoringError
from reranker.types import EncodedRequest, RerankRequest, RerankResult

T = TypeVar("T")


def rerank_many(scorer: Scorer, requests: Iterable[RerankRequest]) -> Iterator[RerankResult | RerankError]:
    """Yield for each request, in order, its result (without timings) or its own error.

    `requests` is read in a thread, about two forward passes ahead of the results.

    Raises:
        ScoringError: a document does not fit into the device's memory.
        DeviceLostError: the device needs a new process.
    """
    pending: deque[EncodedRequest | RerankError] = deque()
    logits: deque[float] = deque()

    def encoded() -> Iterator[EncodedRequest]:
        for request in requests:
            try:
                pending.append(scorer.encode(request))
            except RerankError as error:
                pending.append(error)
            else:
                yield pending[-1]  # type: ignore[misc]  # an EncodedRequest, just appended

    def batches() -> Iterator[Batch]:
        for slices in full_batches(encoded(), lambda: (scorer.max_batch_tokens, scorer.max_batch_documents)):
            yield scorer.pack(slices)

    def finished() -> Iterator[RerankResult | RerankError]:
        while pending:
            first = pending[0]
            if isinstance(first, RerankError):
                yield first
            elif len(logits) < len(first.documents):
                return
            else:
                own = [logits.popleft() for _ in first.documents]
                finite = all(map(math.isfinite, own))
                yield RerankResult.of(per_document(first, own)) if finite else ScoringError(NOT_A_NUMBER)
            pending.popleft()

    for batch in _prefetch(batches()):
        logits += scorer.score(batch)
        yield from finished()
    yield from finished()


def _prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield the items; a thread computes the next one while the caller works with the current one."""
    with ThreadPoolExecutor(1, thread_name_prefix="prefetch") as pool:
        following = pool.submit(next, items, None)
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item
