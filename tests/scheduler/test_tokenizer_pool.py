from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from reranker.errors import InvalidRequestError
from reranker.scheduler.tokenizer_pool import TokenizerPool
from reranker.types import EncodedRequest, RerankRequest
from tests.fake import FakeScorer

Encode = Callable[[str], asyncio.Task[EncodedRequest]]


class Panic(BaseException):
    """A BaseException like the tokenizer's."""


class Blocking(FakeScorer):
    """Tokenising a query with "wait" blocks until `go` is set."""

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
        pool, scorer = TokenizerPool(), Blocking()

        def encode(query: str) -> asyncio.Task[EncodedRequest]:
            return asyncio.create_task(pool.encode(scorer, RerankRequest(query, ["red fish"])))

        try:
            await asyncio.wait_for(test(encode, scorer), 30)
        finally:
            scorer.go.set()
            pool.close()

    asyncio.run(main())


def test_small_requests_share_a_call_and_later_ones_do_not_wait_for_it() -> None:
    async def test(encode: Encode, scorer: Blocking) -> None:
        together = [encode("wait"), encode("one"), encode("two")]
        await asyncio.to_thread(scorer.waits.wait, 30)
        assert (await encode("later")).prefix
        assert scorer.began == ["wait", "later"]
        scorer.go.set()
        assert [len((await task).documents[0]) for task in together] == [2, 2, 2]
        assert scorer.began == ["wait", "later", "one", "two"]

    run(test)


def test_no_small_request_waits_for_a_large_one() -> None:
    async def test(encode: Encode, scorer: Blocking) -> None:
        first, large, last = encode("short"), encode("wait " * 1000), encode("short")
        assert (await first).prefix
        assert (await last).prefix
        assert not large.done()
        scorer.go.set()
        assert (await large).prefix

    run(test)


def test_a_failed_or_cancelled_request_does_not_affect_its_microbatch() -> None:
    async def test(encode: Encode, scorer: Blocking) -> None:
        first, cancelled, wrong = encode("wait"), encode("cancelled"), encode("too long")
        panic, last = encode("panic"), encode("last")
        await asyncio.to_thread(scorer.waits.wait, 30)
        cancelled.cancel()
        await asyncio.wait([cancelled])
        scorer.go.set()
        with pytest.raises(InvalidRequestError):
            await wrong
        with pytest.raises(RuntimeError, match="Panic"):  # an Exception, so that error handlers see it
            await panic
        assert (await first).documents == (await last).documents
        assert scorer.began == ["wait", "too long", "panic", "last"]

    run(test)


def test_closing_cancels_pending_requests() -> None:
    async def main() -> None:
        pool, scorer = TokenizerPool(), Blocking()
        request = RerankRequest("wait", ["red"])
        running = [asyncio.create_task(pool.encode(scorer, request)) for _ in range(3)]
        await asyncio.to_thread(scorer.waits.wait, 30)
        pending = asyncio.create_task(pool.encode(scorer, request))
        await asyncio.sleep(0)
        pool.close()
        await asyncio.wait([pending])
        assert pending.cancelled()
        scorer.go.set()
        assert all(encoded.prefix for encoded in await asyncio.gather(*running))

    asyncio.run(asyncio.wait_for(main(), 30))
