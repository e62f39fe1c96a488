"""Tokenising, in host threads: short requests that come together share a trip to a thread, long ones go by turns.

A trip costs as much as tokenising a few sentences: two threads wake each other and pass Python's lock to and fro.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from reranker.scheduler.compute import ScorerLike, catch_panics
from reranker.types import EncodedRequest, RerankRequest

# Texts are tokenised in parts of about so many characters, by turns: 0.1 s of work, so that nobody waits for long.
_PART_CHARACTERS = 200_000
# What shares a trip: 1 ms of work, for which its first request waits for its last one.
_TRIP_CHARACTERS = 2_000

Outcome = EncodedRequest | Exception | None
"""None: nobody waited for it any more."""


class Passenger(NamedTuple):
    """A request that waits for its trip."""

    request: RerankRequest
    characters: int
    encoded: asyncio.Future[EncodedRequest]


class Encoder:
    """Two threads for most requests, and two for big ones, so that nobody is tokenised behind those."""

    def __init__(self) -> None:
        self._host = ThreadPoolExecutor(2, thread_name_prefix="host")
        self._bulk = ThreadPoolExecutor(2, thread_name_prefix="bulk")
        self._waiting: list[Passenger] = []
        """What came in this turn of the event loop."""

    async def encode(self, scorer: ScorerLike, request: RerankRequest) -> EncodedRequest:
        """Texts to tokens.

        Raises:
            Exception: the scorer's.
        """
        loop = asyncio.get_running_loop()
        characters = request.characters
        if characters <= _PART_CHARACTERS:
            encoded: asyncio.Future[EncodedRequest] = loop.create_future()
            if not self._waiting:
                loop.call_soon(self._depart, scorer)
            self._waiting.append(Passenger(request, characters, encoded))
            return await encoded
        parts: list[EncodedRequest] = []
        start = size = 0
        for i, document in enumerate(request.documents):
            size += len(document)
            if size >= _PART_CHARACTERS or i == len(request.documents) - 1:
                part = request.only(range(start, i + 1))
                parts.append(await loop.run_in_executor(self._bulk, catch_panics(scorer.encode), part))
                start, size = i + 1, 0
        return EncodedRequest.join(parts)

    def close(self) -> None:
        """Start nothing more."""
        for pool in (self._host, self._bulk):
            pool.shutdown(wait=False, cancel_futures=True)
        for passenger in self._waiting:
            passenger.encoded.cancel()
        self._waiting = []

    def _depart(self, scorer: ScorerLike) -> None:
        waiting, self._waiting = self._waiting, []
        for trip in _trips(waiting):
            work = asyncio.get_running_loop().run_in_executor(self._host, _encode, scorer, trip)
            work.add_done_callback(partial(_arrive, trip))


def _trips(waiting: list[Passenger]) -> Iterator[list[Passenger]]:
    trip: list[Passenger] = []
    size = 0
    for passenger in waiting:
        if trip and size + passenger.characters > _TRIP_CHARACTERS:
            yield trip
            trip, size = [], 0
        trip.append(passenger)
        size += passenger.characters
    if trip:
        yield trip


def _encode(scorer: ScorerLike, trip: list[Passenger]) -> list[Outcome]:
    """In a host thread."""
    outcomes: list[Outcome] = []
    encode = catch_panics(scorer.encode)
    for passenger in trip:
        try:
            outcomes.append(None if passenger.encoded.done() else encode(passenger.request))
        except Exception as error:  # its own request's alone
            outcomes.append(error)
    return outcomes


def _arrive(trip: list[Passenger], work: asyncio.Future[list[Outcome]]) -> None:
    if work.cancelled():  # the service stops
        for passenger in trip:
            passenger.encoded.cancel()
        return
    for passenger, outcome in zip(trip, work.result(), strict=True):
        if passenger.encoded.done():
            continue
        if isinstance(outcome, Exception):
            passenger.encoded.set_exception(outcome)
        elif outcome is not None:
            passenger.encoded.set_result(outcome)
