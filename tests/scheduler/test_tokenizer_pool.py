from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from reranker.errors import InvalidRequestError
from reranker.scheduler.tokenizer_pool import Encoder
from reranker.types import EncodedRequest, RerankRequest
from tests.fake import FakeScorer

Encode = Callable[[str], asyncio.Task[EncodedRequest]]


class Panic(BaseException):
    """As the tokenizer's library raises it: no Exception."""


class Blocking(FakeScorer):
    """Tokenising a query with "wait" waits for `go`."""

    def __init__(self) -> None:
        super().__init__()
        self.began: list[str] = []
        self.waits, self.go = threading.Event(), threading.Event()

    def encode(self, request: RerankRequest) -> EncodedRequest:
        self.began.append(request.query[:20])
        if "wait" in request.query:
            self.waits.set()
            self.go.wait(30)
        if "panic" in request.query:
            raise Panic
        return super().encode(request)


def run(test: Callable[[Encode, Blocking], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        encoder, scorer = Encoder(), Blocking()

        def encode(query: str) -> asyncio.Task[EncodedRequest]:
            return asyncio.create_task(encoder.encode(scorer, RerankRequest(query, ["red fish"])))

        try:
            await asyncio.wait_for(test(encode, scorer), 30)
        finally:
            scorer.go.set()
            encoder.close()

    asyncio.run(main())


def test_short_requests_that_come_together_share_a_trip_and_later_ones_do_not_wait_for_it() -> None:
    async def test(encode: Encode, scorer: Blocking) -> None:
        together = [encode("wait"), encode("one"), encode("two")]
        await asyncio.to_thread(scorer.waits.wait, 30)
        assert (await encode("later")).prefix
        assert scorer.began == ["wait", "later"]
        scorer.go.set()
        assert [len((await task).documents[0]) for task in together] == [2, 2, 2]
        assert scorer.began == ["wait", "later", "one", "two"]

    run(test)


def test_no_short_request_waits_for_a_long_one() -> None:
    async def test(encode: Encode, scorer: Blocking) -> None:
        before, long, behind = encode("short"), encode("wait " * 1000), encode("short")
        assert (await before).prefix
        assert (await behind).prefix
        assert not long.done()
        scorer.go.set()
        assert (await long).prefix

    run(test)


def test_one_that_fails_or_leaves_costs_the_others_of_its_trip_nothing() -> None:
    async def test(encode: Encode, scorer: Blocking) -> None:
        first, left, wrong = encode("wait"), encode("left"), encode("too long")
        panic, last = encode("panic"), encode("last")
        await asyncio.to_thread(scorer.waits.wait, 30)
        left.cancel()
        await asyncio.wait([left])
        scorer.go.set()
        with pytest.raises(InvalidRequestError):
            await wrong
        with pytest.raises(RuntimeError, match="Panic"):  # an Exception: all who deal with errors see it
            await panic
        assert (await first).documents == (await last).documents
        assert scorer.began == ["wait", "too long", "panic", "last"]

    run(test)


def test_stopping_leaves_nobody_waiting() -> None:
    async def main() -> None:
        encoder, scorer = Encoder(), Blocking()
        request = RerankRequest("wait", ["red"])
        on_the_way = [asyncio.create_task(encoder.encode(scorer, request)) for _ in range(3)]
        await asyncio.to_thread(scorer.waits.wait, 30)
        at_the_door = asyncio.create_task(encoder.encode(scorer, request))
        await asyncio.sleep(0)
        encoder.close()
        await asyncio.wait([at_the_door])
        assert at_the_door.cancelled()
        scorer.go.set()
        assert all(encoded.prefix for encoded in await asyncio.gather(*on_the_way))

    asyncio.run(asyncio.wait_for(main(), 30))
