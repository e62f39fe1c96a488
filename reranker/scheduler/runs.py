"""A request with several queries, in runs: parts of it that are tokenised, queued and scored together.

A run has few tokens and two runs are in progress at a time, so that the many small jobs of such a request leave most of
every batch to other clients, and one run is tokenised while the other is scored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence

_IN_PROGRESS = 2


def split(tokens: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Split queries, by their tokens, into consecutive runs of at most `max_tokens`, or of one query."""
    start = total = 0
    for i, count in enumerate(tokens):
        if i > start and total + count > max_tokens:
            yield slice(start, i)
            start, total = i, 0
        total += count
    if start < len(tokens):
        yield slice(start, len(tokens))


async def in_turns(runs: Iterable[slice], work: Callable[[slice], Awaitable[None]]) -> None:
    """Call `work` with every run, two at a time; an error or a cancellation ends both."""
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
