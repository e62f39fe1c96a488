"""A request with several queries, in runs: parts of it that are tokenised, queued and scored together.

A run has few tokens and two runs are in progress at a time, so that the many small jobs of such a request leave most of
every batch to other clients, and one run is tokenised while the other is scored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from reranker.types import DocumentScore, RerankRequest

_IN_PROGRESS = 2


def split(tokens: Sequence[int], max_tokens: int) -> list[slice]:
    """Split at least one query, by their tokens, into consecutive runs of at most `max_tokens`, or of one query."""
    runs: list[slice] = []
    start = total = 0
    for i, count in enumerate(tokens):
        if i > start and total + count > max_tokens:
            runs.append(slice(start, i))
            start, total = i, 0
        total += count
    return [*runs, slice(start, len(tokens))]


async def in_turns(runs: Sequence[slice], work: Callable[[slice], Awaitable[None]]) -> None:
    """Call `work` with every run, two at a time; an error or a cancellation ends both."""
    if len(runs) == 1:  # without a further task
        await work(runs[0])
        return
    rest = iter(runs)

    async def turns() -> None:
        for run in rest:
            await work(run)

    tasks = [asyncio.create_task(turns()) for _ in range(_IN_PROGRESS)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def in_order(requests: Sequence[RerankRequest], parts: Sequence[list[DocumentScore]]) -> list[DocumentScore]:
    """Return the scores of all requests by the positions of their documents, which are 0, 1, 2, ..."""
    if len(requests) == 1:
        return parts[0]
    scores = {
        request.position(i): score
        for request, part in zip(requests, parts, strict=True)
        for i, score in enumerate(part)
    }
    return [scores[i] for i in range(len(scores))]
