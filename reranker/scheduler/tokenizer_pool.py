"""Tokenising in host threads: small requests are micro-batched into one executor call, large ones are split.

A call costs as much as tokenising a few sentences: two threads wake each other and exchange Python's lock.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from reranker.scheduler.compute import ScorerLike, catch_panics
from reranker.types import EncodedRequest, RerankRequest

# A larger request is tokenised in parts of this size: 0.1 s of work each, so that other large requests get their turn.
_MAX_PART_CHARACTERS = 200_000
# 1 ms of work: the delay of a microbatch's first request by its last one.
_MAX_MICROBATCH_CHARACTERS = 2_000

Pending = tuple[RerankRequest, asyncio.Future[EncodedRequest]]
Outcome = tuple[asyncio.Future[EncodedRequest], EncodedRequest | Exception]


class TokenizerPool:
    """Two threads for most requests, and two for large ones, which would delay the others."""

    def __init__(self) -> None:
        self._host = ThreadPoolExecutor(2, thread_name_prefix="host")
        self._bulk = ThreadPoolExecutor(2, thread_name_prefix="bulk")
        self._pending: list[Pending] = []
        """Requests of this iteration of the event loop."""

    async def encode(self, scorer: ScorerLike, request: RerankRequest) -> EncodedRequest:
        """Tokenise a request; raises any error of the scorer."""
        loop = asyncio.get_running_loop()
        if request.characters > _MAX_PART_CHARACTERS:
            encode = catch_panics(scorer.encode)
            parts = [await loop.run_in_executor(self._bulk, encode, part) for part in _parts(request)]
            return EncodedRequest.join(parts)
        encoded: asyncio.Future[EncodedRequest] = loop.create_future()
        if not self._pending:
            loop.call_soon(self._submit, scorer)
        self._pending.append((request, encoded))
        return await encoded

    def close(self) -> None:
        """Cancel the pending requests and start no further work."""
        for pool in (self._host, self._bulk):
            pool.shutdown(wait=False, cancel_futures=True)
        for _, encoded in self._pending:
            encoded.cancel()
        self._pending = []

    def _submit(self, scorer: ScorerLike) -> None:
        requests, self._pending = self._pending, []
        for microbatch in _microbatches(requests):
            work = asyncio.get_running_loop().run_in_executor(self._host, _encode, scorer, microbatch)
            work.add_done_callback(partial(_resolve, microbatch))


def _parts(request: RerankRequest) -> Iterator[RerankRequest]:
    """Split a request between documents into parts of about `_MAX_PART_CHARACTERS`."""
    start = size = 0
    for i, document in enumerate(request.documents):
        size += len(document)
        if size >= _MAX_PART_CHARACTERS or i == len(request.documents) - 1:
            yield request.only(range(start, i + 1))
            start, size = i + 1, 0


def _microbatches(requests: list[Pending]) -> Iterator[list[Pending]]:
    microbatch: list[Pending] = []
    size = 0
    for request, encoded in requests:
        characters = request.characters
        if microbatch and size + characters > _MAX_MICROBATCH_CHARACTERS:
            yield microbatch
            microbatch, size = [], 0
        microbatch.append((request, encoded))
        size += characters
    if microbatch:
        yield microbatch


def _encode(scorer: ScorerLike, microbatch: list[Pending]) -> list[Outcome]:
    """Tokenise in a host thread; an error fails only its own request."""
    outcomes: list[Outcome] = []
    encode = catch_panics(scorer.encode)
    for request, encoded in microbatch:
        if encoded.done():  # cancelled
            continue
        try:
            outcomes.append((encoded, encode(request)))
        except Exception as error:
            outcomes.append((encoded, error))
    return outcomes


def _resolve(microbatch: list[Pending], work: asyncio.Future[list[Outcome]]) -> None:
    if work.cancelled():  # by `close`
        for _, encoded in microbatch:
            encoded.cancel()
        return
    for encoded, outcome in work.result():
        if encoded.done():
            continue
        if isinstance(outcome, Exception):
            encoded.set_exception(outcome)
        else:
            encoded.set_result(outcome)
