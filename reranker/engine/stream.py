"""A long stream of requests through one scorer: forward passes are shared between requests and always full.

The offline counterpart of the service's batcher: nobody waits for an answer, so requests keep their order, and while
one pass runs, a thread tokenises and packs the next.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from reranker.engine.budget import fill
from reranker.engine.scorer import Batch, Scorer
from reranker.engine.scores import per_document
from reranker.errors import RerankError, ScoringError
from reranker.types import EncodedRequest, RerankRequest, RerankResult

T = TypeVar("T")


def rerank_many(scorer: Scorer, requests: Iterable[RerankRequest]) -> Iterator[RerankResult | RerankError]:
    """For each request, in order, its result (without timings) or the error that it alone causes.

    `requests` is read in a thread, about two forward passes ahead of the results.

    Raises:
        ScoringError: a document does not fit into the device's memory.
        DeviceLostError: the device needs a new process.
    """
    waiting: deque[EncodedRequest | RerankError] = deque()
    logits: deque[float] = deque()

    def encoded() -> Iterator[EncodedRequest]:
        for request in requests:
            try:
                waiting.append(scorer.encode(request))
            except RerankError as error:
                waiting.append(error)
            else:
                yield waiting[-1]  # type: ignore[misc]  # the success just appended

    def passes() -> Iterator[Batch]:
        for slices in fill(encoded(), lambda: (scorer.max_batch_tokens, scorer.max_batch_documents)):
            yield scorer.pack(slices)

    def finished() -> Iterator[RerankResult | RerankError]:
        while waiting:
            first = waiting[0]
            if isinstance(first, RerankError):
                yield first
            elif len(logits) >= len(first.documents):
                yield _result(first, [logits.popleft() for _ in first.documents])
            else:
                return
            waiting.popleft()

    for batch in _ahead(passes()):
        logits += scorer.score(batch)
        yield from finished()
    yield from finished()


def _result(request: EncodedRequest, logits: list[float]) -> RerankResult | RerankError:
    if not all(map(math.isfinite, logits)):
        return ScoringError("the model gave a score that is not a number; set MODEL_PRECISION=float32")
    return RerankResult.of(per_document(request, logits))


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next one is made in a thread while the caller works with this one."""
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as pool:
        coming = pool.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = pool.submit(next, items, None)
            yield item
