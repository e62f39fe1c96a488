from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from reranker.errors import (
    DeadlineError,
    DeviceLostError,
    InvalidRequestError,
    ModelLoadError,
    NotReadyError,
    QueueFullError,
    ScoringError,
)
from reranker.scheduler import batcher as batcher_module
from reranker.scheduler import passes as passes_module
from reranker.scheduler.batcher import Batcher
from reranker.scheduler.events import ForwardPass
from reranker.types import Chunk, EncodedRequest, RerankRequest, RerankResult, Slice
from tests.fake import PREFIX, FakeLanes, FakeScorer


def ask(documents: int = 1, query: str = "red fish", words: str = "red") -> RerankRequest:
    return RerankRequest(query, [words] * documents)


def run(
    test: Callable[[Batcher], Coroutine[Any, Any, None]],
    scorer: FakeScorer,
    loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.new_event_loop,
    **options: Any,
) -> None:
    """Run `test` with a loaded batcher around `scorer`."""

    async def main() -> None:
        batcher = Batcher(lambda: scorer, **options)
        await batcher.start()
        await batcher.wait_until_loaded()
        try:
            await test(batcher)
        finally:
            scorer.hold.set()
            await batcher.stop()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


async def held(batcher: Batcher, scorer: FakeScorer, request: RerankRequest) -> asyncio.Task[RerankResult]:
    """Start a request, and wait until it is in a forward pass; the pass does not end before `scorer.hold` is set."""
    scorer.hold.clear()
    passes = len(scorer.passes)
    task = asyncio.create_task(batcher.rerank(request, 30))
    while len(scorer.passes) == passes:
        await asyncio.sleep(0.001)
    return task


async def queued(batcher: Batcher, *requests: RerankRequest, seconds: float = 30) -> list[asyncio.Task[RerankResult]]:
    """Start requests, and wait until they are in the queue."""
    tasks = []
    for request in requests:
        tasks.append(asyncio.create_task(batcher.rerank(request, seconds)))
        before = len(batcher.queue)
        while len(batcher.queue) == before and not tasks[-1].done():
            await asyncio.sleep(0.001)
    return tasks


def test_scores_come_in_document_order_with_counts_and_times() -> None:
    scorer = FakeScorer(seconds=0.01)

    async def test(batcher: Batcher) -> None:
        result = await batcher.rerank(RerankRequest("red fish", ["a bird", "red fish", "a fish"]), 30)
        assert result.logits == [0.0, 2.0, 1.0]
        assert result.prompt_tokens == 3 * PREFIX + 6
        times = result.timings
        assert times.inference >= 0.01
        assert times.total >= times.inference + times.queue + times.tokenization - 1e-3

    run(test, scorer)


def test_pending_requests_share_a_pass_and_nothing_runs_on_the_event_loop() -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        others = await queued(batcher, *[ask(3, query=f"q{i} red") for i in range(5)])
        scorer.hold.set()
        for task in [first, *others]:
            assert set((await task).logits) == {1.0}
        assert [len(p) for p in scorer.passes] == [1, 5]
        assert all(name.startswith(("host", "device")) for name in scorer.threads)

    run(test, scorer)


def test_a_small_request_overtakes_a_huge_one() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX + 20)

    async def test(batcher: Batcher) -> None:
        huge = await held(batcher, scorer, ask(200))
        [small] = await queued(batcher, ask(2))
        scorer.hold.set()
        await small
        # The running pass, the one packed ahead, and its own.
        assert len(scorer.passes) <= 4
        assert not huge.done()
        assert (await huge).logits == [1.0] * 200

    run(test, scorer)


def test_a_full_batch_is_packed_while_the_device_runs() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX + 4)
    packed: list[str] = []
    pack = scorer.pack

    def record(slices: Sequence[Slice]) -> list[Slice]:
        packed.append(threading.current_thread().name)
        return pack(slices)

    scorer.pack = record  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(4))
        assert packed == ["device_0"]  # it was idle
        [second] = await queued(batcher, ask(2))
        await asyncio.sleep(0.02)
        assert len(packed) == 1  # not full: later requests may join it
        third = asyncio.create_task(batcher.rerank(ask(4), 30))
        while len(packed) < 2:
            await asyncio.sleep(0.001)
        assert packed == ["device_0", "packer_0"]
        assert len(scorer.passes) == 1
        scorer.hold.set()
        await asyncio.gather(first, second, third)

    run(test, scorer)


def test_a_small_request_gets_into_the_next_pass_before_half_of_this_one_is_over() -> None:
    scorer = FakeScorer(max_batch_tokens=4 * PREFIX)
    score, gate = scorer.score, threading.Semaphore(0)
    batches: list[list[Slice]] = []

    def gated(batch: list[Slice]) -> list[float]:
        batches.append(batch)
        gate.acquire(timeout=30)
        return score(batch)

    scorer.score = gated  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        batcher.admission.tokens_per_second = 0.1  # so every pass is expected to be slow
        batcher.admission.observe_speed = lambda tokens, seconds: None  # type: ignore[method-assign]
        huge = await queued(batcher, ask(200), ask(200), seconds=10_000)
        for i in range(3):
            while len(batches) == i:
                await asyncio.sleep(0.001)
            gate.release()
        while len(batches) < 4:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        [small] = await queued(batcher, ask(1, query="small red"))
        gate.release(50)
        assert (await small).logits == [1.0]
        await asyncio.gather(*huge)
        assert [scorer.words["small"] in [s.request.prefix[0] for s in p] for p in batches[:5]] == [False] * 4 + [True]

    run(test, scorer)


def test_a_full_queue_refuses_immediately_and_says_when_to_try_again() -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        pending = await queued(batcher, ask(50))
        with pytest.raises(QueueFullError) as caught:
            await batcher.rerank(ask(50), 30)
        assert caught.value.status == 429
        assert caught.value.retry_after is not None
        assert caught.value.retry_after >= 1
        pending += await queued(batcher, ask(10))  # a smaller one still fits
        scorer.hold.set()
        await asyncio.gather(first, *pending)
        assert batcher.admission.requests == 0
        # Larger than the whole queue: accepted while nothing is pending, or it never could be.
        assert len((await batcher.rerank(ask(500), 30)).logits) == 500

    run(test, scorer, max_queue_tokens=100)


def test_a_refused_request_is_never_tokenised_and_an_accepted_one_never_refused() -> None:
    scorer = FakeScorer()
    encode, encoded = scorer.encode, threading.Semaphore(0)

    def slow(request: RerankRequest) -> EncodedRequest:
        encoded.release()
        scorer.hold.wait(30)
        return encode(request)

    scorer.encode = slow  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        scorer.hold.clear()
        tasks = [asyncio.create_task(batcher.rerank(ask(20), 30)) for _ in range(100)]
        await asyncio.sleep(0.05)  # all of them start before any is tokenised
        scorer.hold.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        scored = [result.logits for result in results if isinstance(result, RerankResult)]
        assert 2 <= len(scored) < 20
        assert all(logits == [1.0] * 20 for logits in scored)
        assert sum(isinstance(result, QueueFullError) for result in results) == 100 - len(scored)
        for _ in scored:
            assert encoded.acquire(blocking=False)
        assert not encoded.acquire(blocking=False)

    run(test, scorer, max_queue_tokens=1000)


class SlowDevice(FakeScorer):
    """A scorer of 2400 tokens per second by a clock that only its passes advance."""

    now = 0.0

    def score(self, batch: list[Slice]) -> list[float]:
        self.now += sum(part.tokens for part in batch) / 2400
        return super().score(batch)


def test_nothing_is_accepted_that_cannot_be_answered_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = SlowDevice(max_batch_tokens=10 * (PREFIX + 2))
    for module in (batcher_module, passes_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: scorer.now))

    class Loop(asyncio.SelectorEventLoop):
        def time(self) -> float:
            return scorer.now

    async def test(batcher: Batcher) -> None:
        await asyncio.gather(*[batcher.rerank(ask(2), 30) for _ in range(30)])  # it learns its speed
        results = await asyncio.gather(*[batcher.rerank(ask(2), 2) for _ in range(1000)], return_exceptions=True)
        assert {type(result) for result in results} == {RerankResult, QueueFullError}
        assert 50 < sum(isinstance(result, RerankResult) for result in results) < 250  # at full speed 400

    run(test, scorer, Loop, max_queue_tokens=1_000_000)


def test_huge_requests_do_not_delay_the_tokenisation_of_a_small_one() -> None:
    scorer = FakeScorer(max_batch_tokens=10_000_000)
    encode, go, blocked = scorer.encode, threading.Event(), threading.Semaphore(0)

    def block(request: RerankRequest) -> EncodedRequest:
        if "huge" in request.query:
            blocked.release()
            go.wait(60)
        return encode(request)

    scorer.encode = block  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        documents = ["red " * 60_000] * 2
        huge = [asyncio.create_task(batcher.rerank(RerankRequest("huge", documents), 30)) for _ in range(8)]
        for _ in range(2):  # both threads for huge requests
            await asyncio.to_thread(blocked.acquire)
        assert (await batcher.rerank(ask(), 30)).logits == [1.0]
        assert not any(task.done() for task in huge)
        go.set()
        await asyncio.gather(*huge)

    run(test, scorer, max_queue_tokens=100_000_000)


def test_too_many_requests_in_progress_are_refused() -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        tasks = [await held(batcher, scorer, ask()), *(await queued(batcher, ask(), ask()))]
        with pytest.raises(QueueFullError, match="3 requests are in progress"):
            await batcher.rerank(ask(), 30)
        scorer.hold.set()
        await asyncio.gather(*tasks)
        await batcher.rerank(ask(), 30)

    run(test, scorer, max_requests=3)


def test_a_cancelled_request_leaves_the_queue() -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        cancelled = await queued(batcher, *[ask(5) for _ in range(20)])
        [stays] = await queued(batcher, ask(1, words="fish"))
        for task in cancelled:
            task.cancel()
        await asyncio.gather(*cancelled, return_exceptions=True)
        assert batcher.queue.tokens == PREFIX + 1
        scorer.hold.set()
        await asyncio.gather(first, stays)
        assert [len(p) for p in scorer.passes] == [1, 1]
        assert batcher.admission.requests == 0

    run(test, scorer)


def test_the_deadline_drops_queued_work() -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        with pytest.raises(DeadlineError, match=r"not answered within 0\.05 s"):
            await batcher.rerank(ask(5), 0.05)
        assert (batcher.queue.tokens, batcher.admission.requests) == (0, 1)
        scorer.hold.set()
        await first
        assert len(scorer.passes) == 1

    run(test, scorer)


@pytest.mark.parametrize("words", ["poison", "nan"])
def test_a_broken_request_harms_no_other(words: str) -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        good = await queued(batcher, *[ask(3) for _ in range(3)])
        [bad] = await queued(batcher, ask(2, words=f"red {words}"))
        good += await queued(batcher, ask(3))
        scorer.hold.set()
        for task in [first, *good]:
            assert set((await task).logits) == {1.0}
        with pytest.raises(ScoringError) as caught:
            await bad
        assert caught.value.status == 500
        assert "kernel" not in str(caught.value)
        assert (await batcher.rerank(ask(), 30)).logits == [1.0]

    run(test, scorer)


def test_an_error_of_the_tokeniser_reaches_the_client() -> None:
    async def test(batcher: Batcher) -> None:
        with pytest.raises(InvalidRequestError):
            await batcher.rerank(ask(query="too long"), 30)
        assert batcher.admission.requests == 0

    run(test, FakeScorer())


def test_a_lost_device_fails_all_requests_and_ends_the_worker_once() -> None:
    scorer = FakeScorer()
    failures: list[Exception] = []

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        waiting = await queued(batcher, ask(), ask())

        def lost(batch: object) -> list[float]:
            raise DeviceLostError("the device failed", retry_after=10)

        scorer.score = lost  # type: ignore[method-assign]
        scorer.hold.set()
        assert (await first).logits == [1.0]
        for task in waiting:
            with pytest.raises(DeviceLostError):
                await task
        assert batcher.status == "unhealthy"
        assert len(failures) == 1
        batcher.unhealthy_retry_after = 7
        with pytest.raises(NotReadyError, match="the service is unhealthy; try again in 7 s"):
            await batcher.rerank(ask(), 30)

    run(test, scorer, on_failure=failures.append)


def test_whoever_waits_is_answered_although_the_worker_cannot_step_aside(caplog: pytest.LogCaptureFixture) -> None:
    scorer, failures = FakeScorer(), list[Exception]()

    async def test(batcher: Batcher) -> None:
        batcher.on_unhealthy = lambda: [][1]
        first = await held(batcher, scorer, ask())
        waiting = await queued(batcher, ask(), ask())

        def lost(batch: object) -> list[float]:
            raise DeviceLostError("the device failed", retry_after=10)

        scorer.score = lost  # type: ignore[method-assign]
        scorer.hold.set()
        await first
        for task in waiting:
            with pytest.raises(DeviceLostError):
                await task
        assert len(failures) == 1

    run(test, scorer, on_failure=failures.append)
    assert "IndexError" in caplog.text


@pytest.mark.parametrize("error", [ModelLoadError("no such folder"), RuntimeError("anything")])
def test_a_load_that_fails_is_reported(error: Exception) -> None:
    async def main() -> None:
        failures: list[Exception] = []

        def load() -> FakeScorer:
            raise error

        batcher = Batcher(load, on_failure=failures.append)
        await batcher.start()
        while not failures:
            await asyncio.sleep(0.001)
        assert failures == [error]
        assert batcher.status == "unhealthy"
        await batcher.stop()

    asyncio.run(main())


def test_a_load_that_hangs_is_reported() -> None:
    async def main() -> None:
        failures: list[Exception] = []
        go = threading.Event()

        def load() -> FakeScorer:
            go.wait(60)
            return FakeScorer()

        batcher = Batcher(load, load_timeout=0.05, on_failure=failures.append)
        await batcher.start()
        with pytest.raises(NotReadyError, match="loading"):
            await batcher.rerank(ask(), 30)
        while not failures:
            await asyncio.sleep(0.01)
        assert "LOAD_TIMEOUT=0.05" in str(failures[0])
        go.set()
        await batcher.stop()

    asyncio.run(main())


def test_draining_finishes_accepted_requests_and_accepts_no_new_ones() -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        tasks = [await held(batcher, scorer, ask()), *(await queued(batcher, ask(), ask()))]
        batcher.drain()
        with pytest.raises(NotReadyError, match="draining"):
            await batcher.rerank(ask(), 30)
        scorer.hold.set()
        for task in tasks:
            assert (await task).logits == [1.0]

    run(test, scorer)


def test_draining_finishes_requests_that_are_being_tokenised() -> None:
    scorer = FakeScorer()
    encode, started = scorer.encode, threading.Event()

    def slow(request: RerankRequest) -> EncodedRequest:
        started.set()
        scorer.hold.wait(30)
        return encode(request)

    scorer.encode = slow  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        scorer.hold.clear()
        task = asyncio.create_task(batcher.rerank(ask(), 30))
        await asyncio.to_thread(started.wait, 30)
        batcher.drain()
        scorer.hold.set()
        assert (await task).logits == [1.0]

    run(test, scorer)


def test_tokenising_does_not_delay_packing() -> None:
    scorer = FakeScorer()
    encode, go, blocked = scorer.encode, threading.Event(), threading.Semaphore(0)

    def block(request: RerankRequest) -> EncodedRequest:
        if "slow" in request.query:
            blocked.release()
            go.wait(60)
        return encode(request)

    scorer.encode = block  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        [quick] = await queued(batcher, ask())
        slow = []
        for _ in range(2):  # one microbatch for each host thread
            slow.append(asyncio.create_task(batcher.rerank(ask(query="slow red"), 30)))
            await asyncio.to_thread(blocked.acquire)
        scorer.hold.set()
        await asyncio.gather(first, quick)
        assert not any(task.done() for task in slow)
        go.set()
        await asyncio.gather(*slow)

    run(test, scorer)


def test_a_batch_packed_ahead_is_not_scored_if_all_its_clients_disconnect() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX + 4)
    packed: list[int] = []
    pack = scorer.pack
    scorer.pack = lambda slices: packed.append(len(slices)) or pack(slices)  # type: ignore[method-assign,func-returns-value]

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(4))
        cancelled = asyncio.create_task(batcher.rerank(ask(4), 30))
        while len(packed) < 2:
            await asyncio.sleep(0.001)
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        scorer.hold.set()
        await first
        await batcher.rerank(ask(), 30)
        assert len(scorer.passes) == 2

    run(test, scorer)


def test_a_bug_in_the_loop_ends_the_worker_instead_of_hanging() -> None:
    failures: list[Exception] = []

    class Broken(FakeScorer):
        @property
        def memory(self) -> int:
            if self.passes:
                raise OSError("a bug after a forward pass")
            return 0

    async def test(batcher: Batcher) -> None:
        await batcher.rerank(ask(), 30)
        while batcher.status == "ok":  # the loop ends after the pass that it answered
            await asyncio.sleep(0.001)
        assert batcher.status == "unhealthy"
        assert isinstance(failures[0], NotReadyError)
        assert "the batch loop failed" in str(failures[0])

    run(test, Broken(), on_failure=failures.append)


def test_a_bug_in_the_loop_answers_what_waits_and_what_is_half_done() -> None:
    scorer = FakeScorer(max_batch_tokens=60)

    def broken(forward_pass: ForwardPass) -> None:
        raise OSError("a bug after a forward pass")

    async def test(batcher: Batcher) -> None:
        batcher._observer.pass_ended = broken  # type: ignore[method-assign]
        half = await held(batcher, scorer, ask(200))  # of several batches
        waiting = await queued(batcher, ask(), ask())
        scorer.hold.set()
        for work in (half, *waiting):
            with pytest.raises(NotReadyError, match="the batch loop failed"):
                await work

    run(test, scorer)


def test_a_bug_is_noticed_while_nothing_else_is_pending() -> None:
    failures: list[Exception] = []

    def broken(wait: float) -> None:
        raise OSError("a bug before a forward pass")

    async def test(batcher: Batcher) -> None:
        batcher._observer.request_started = broken  # type: ignore[method-assign]
        with pytest.raises(NotReadyError, match="the batch loop failed"):
            await batcher.rerank(ask(), 30)
        assert failures

    run(test, FakeScorer(), on_failure=failures.append)


class Panic(BaseException):
    """A BaseException like the tokenizer's."""


def test_a_panic_while_packing_fails_its_batch_alone() -> None:
    scorer = FakeScorer()
    pack = scorer.pack

    def panic(slices: Sequence[Slice]) -> list[Slice]:
        scorer.pack = pack  # type: ignore[method-assign]
        raise Panic("in packing")

    async def test(batcher: Batcher) -> None:
        scorer.pack = panic  # type: ignore[method-assign]
        with pytest.raises(ScoringError):
            await batcher.rerank(ask(), 30)
        await batcher.rerank(ask(), 30)

    run(test, scorer)


def test_an_error_of_packing_ahead_is_raised_by_the_pass_or_not_at_all() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX + 4)
    pack, threads = scorer.pack, list[str]()

    def panic_ahead(slices: Sequence[Slice]) -> list[Slice]:
        threads.append(threading.current_thread().name)
        if threads[-1] == "packer_0":
            raise Panic("in packing")
        return pack(slices)

    scorer.pack = panic_ahead  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        tasks = [await held(batcher, scorer, ask(4)), asyncio.create_task(batcher.rerank(ask(4), 30))]
        while len(threads) < 2:
            await asyncio.sleep(0.001)
        scorer.hold.set()
        for result in await asyncio.gather(*tasks):
            assert result.logits == [1.0] * 4
        assert threads == ["device_0", "packer_0", "device_0"]

    run(test, scorer)


def test_a_panic_while_loading_ends_the_process() -> None:
    failures: list[Exception] = []

    def load() -> FakeScorer:
        raise Panic("in the tokenizer's file")

    async def test() -> None:
        batcher = Batcher(load, max_queue_tokens=1000, on_failure=failures.append)
        await batcher.start()
        while not failures:
            await asyncio.sleep(0.01)
        assert str(failures[0]) == "Panic: in the tokenizer's file"
        assert batcher.status == "unhealthy"
        await batcher.stop()

    asyncio.run(test())


def test_stopping_fails_pending_requests() -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        await held(batcher, scorer, ask())
        waiting = await queued(batcher, ask())
        await batcher.stop()
        with pytest.raises(NotReadyError, match="shutting down"):
            await waiting[0]

    run(test, scorer)


def test_a_large_request_is_tokenised_in_parts() -> None:
    scorer = FakeScorer(max_batch_tokens=10_000_000)
    parts: list[int] = []
    encode = scorer.encode
    scorer.encode = lambda request: parts.append(len(request.documents)) or encode(request)  # type: ignore[method-assign,func-returns-value]

    async def test(batcher: Batcher) -> None:
        documents = [f"red w{i} " * 2000 for i in range(100)]
        result = await batcher.rerank(RerankRequest("red", documents), 60)
        assert result.logits == [1.0] * 100
        assert len(parts) > 5
        assert sum(parts) == 100

    run(test, scorer, max_queue_tokens=10_000_000)


def test_parts_of_a_large_request_keep_its_options_and_document_positions() -> None:
    scorer = FakeScorer(max_batch_tokens=10_000_000)
    parts: list[RerankRequest] = []

    def encode(request: RerankRequest) -> EncodedRequest:
        parts.append(request)
        # Two chunks per document; the second has the query's word.
        entries = [ids for _ in request.documents for ids in ([0], [1])]
        return EncodedRequest([1], entries, frozenset({0}), [[0, 1, 2] for _ in request.documents])

    scorer.encode = encode  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        request = RerankRequest("red", ["x" * 90_000] * 7, "find", 5, 3, truncate=False)
        result = await batcher.rerank(request, 60)
        assert result.logits == [1.0] * 7
        assert result.best_chunks == {i: Chunk(1, 1, 2) for i in range(7)}
        assert result.truncated_documents == len(parts) == 3
        assert [part.position(0) for part in parts] == [0, 3, 6]
        for part in parts:
            assert replace(part, documents=request.documents, positions=None) == request

    run(test, scorer)


def test_many_clients_at_once_get_their_own_scores() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX * 4)

    async def test(batcher: Batcher) -> None:
        async def client(i: int) -> None:
            result = await batcher.rerank(RerankRequest(f"w{i} x", [f"w{i} x", "x", f"w{i + 1}"] * (i % 7 + 1)), 60)
            assert result.logits == [2.0, 1.0, 0.0] * (i % 7 + 1)

        await asyncio.gather(*map(client, range(200)))
        assert batcher.admission.requests == 0
        assert batcher.queue.tokens == 0

    run(test, scorer)


def test_a_pass_that_hangs_loses_the_device_and_no_other_starts() -> None:
    scorer, failures = FakeScorer(max_batch_tokens=PREFIX + 4), list[Exception]()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(4))
        second = asyncio.create_task(batcher.rerank(ask(4), 30))  # packed beside the pass
        with pytest.raises(DeviceLostError, match="a forward pass did not end within 1 s") as caught:
            await first
        assert caught.value.retry_after == 10
        with pytest.raises(NotReadyError):  # a DeviceLostError, unless tokenising took a second
            await second
        assert (batcher.status, len(scorer.passes), len(failures)) == ("unhealthy", 1, 1)

    run(test, scorer, pass_timeout=1, on_failure=failures.append)


def test_a_timeout_error_of_the_scorer_is_not_that_of_the_pass() -> None:
    scorer, failures = FakeScorer(), list[Exception]()
    score = scorer.score

    def time_out(batch: list[Slice]) -> list[float]:
        scorer.score = score  # type: ignore[method-assign]
        raise TimeoutError("of a library")

    async def test(batcher: Batcher) -> None:
        scorer.score = time_out  # type: ignore[method-assign]
        with pytest.raises(ScoringError):
            await batcher.rerank(ask(), 30)
        assert (await batcher.rerank(ask(), 30)).logits == [1.0]
        assert not failures

    run(test, scorer, on_failure=failures.append)


def test_a_timeout_error_of_a_load_is_reported_as_it_is() -> None:
    failures: list[Exception] = []

    def load() -> FakeScorer:
        raise TimeoutError("the hub did not answer")

    async def main() -> None:
        batcher = Batcher(load, on_failure=failures.append)
        await batcher.start()
        await batcher.wait_until_loaded()
        await batcher.stop()

    asyncio.run(main())
    assert [str(error) for error in failures] == ["the hub did not answer"]


def pairs(count: int, words: str = "red") -> list[RerankRequest]:
    """Requests as the score route makes them of one query for each document; they are not in the documents' order."""
    order = [1, 0, *range(2, count)]
    return [RerankRequest(f"red q{i}", [f"{words} {'fish ' * i}"], positions=[i]) for i in order]


@pytest.mark.parametrize("entries", [0, 100])
def test_a_request_with_several_queries_is_scored_in_runs_in_the_order_of_its_documents(entries: int) -> None:
    scorer = FakeScorer(max_batch_tokens=400)  # a query is estimated at about 100 tokens, the size of a run
    sizes: list[int] = []

    async def test(batcher: Batcher) -> None:
        requests = [replace(request, query=f"red {'fish' * (request.positions == [3])}") for request in pairs(8)]
        requests.append(RerankRequest("fish", ["red", "red fish", "fish fish"], positions=[8, 10, 9]))
        for _ in range(2):  # the second time from the cache
            result = await batcher.rerank_all(requests, 30)
            assert result.logits == [1.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 0.0, 1.0, 1.0]
            assert result.prompt_tokens == 11 * PREFIX + sum(range(1, 9)) + 5
            times = result.timings
            assert times.total >= times.tokenization + times.queue + times.inference >= 0
            if not sizes:
                sizes.extend(sum(part.stop - part.start for part in batch) for batch in scorer.passes)
        assert (batcher.queue.tokens, batcher.admission.requests, batcher.admission._pending) == (0, 0, 0)
        assert sum(sizes) == 11
        assert max(sizes) <= 4  # two runs at most share a pass
        documents = sum(part.stop - part.start for batch in scorer.passes for part in batch)
        assert documents == (11 if entries else 22)

    run(test, scorer, cache_entries=entries)


def test_a_request_with_several_queries_is_admitted_as_a_whole() -> None:
    scorer = FakeScorer(max_batch_tokens=400)

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        requests = [RerankRequest(f"red q{i}", ["red"], positions=[i]) for i in range(300)]
        group = asyncio.create_task(batcher.rerank_all(requests, 30))
        while not len(batcher.queue):
            await asyncio.sleep(0.001)
        # Two runs at most are in the queue, and the rest is reserved: too much beside it for another such request.
        assert batcher.queue.tokens <= 200
        assert batcher.admission.requests == 2
        with pytest.raises(QueueFullError):
            await batcher.rerank_all(requests, 30)
        small = asyncio.create_task(batcher.rerank(ask(), 30))  # it is not excluded
        scorer.hold.set()
        assert set((await group).logits) == {1.0}
        await asyncio.gather(first, small)
        assert batcher.admission._pending == 0

    run(test, scorer, max_queue_tokens=5000)


@pytest.mark.parametrize("seconds", [30, 0.3])
def test_the_end_of_a_request_with_several_queries_drops_all_of_them(seconds: float) -> None:
    scorer = FakeScorer(max_batch_tokens=400)

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask())
        group = asyncio.create_task(batcher.rerank_all(pairs(30), seconds))
        while not len(batcher.queue):
            await asyncio.sleep(0.001)
        if seconds == 30:
            group.cancel()
        with pytest.raises(asyncio.CancelledError if seconds == 30 else DeadlineError):
            await group
        assert (batcher.queue.tokens, batcher.admission.requests, batcher.admission._pending) == (0, 1, 0)
        scorer.hold.set()
        await first
        assert len(scorer.passes) == 1

    run(test, scorer)


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (RerankRequest("red", ["nan"], positions=[30]), ScoringError),
        (RerankRequest("red", ["poison"], positions=[30]), ScoringError),
        (RerankRequest("too long", ["red"], positions=[30]), InvalidRequestError),
    ],
)
def test_one_broken_query_fails_its_request_and_no_other(request_: RerankRequest, error: type[Exception]) -> None:
    scorer = FakeScorer(max_batch_tokens=400)

    async def test(batcher: Batcher) -> None:
        good = asyncio.create_task(batcher.rerank_all(pairs(30), 30))
        with pytest.raises(error):
            await batcher.rerank_all([*pairs(30), request_], 30)
        assert set((await good).logits) == {1.0}
        await asyncio.sleep(0)  # the other run of the broken request ends
        assert (batcher.queue.tokens, batcher.admission.requests, batcher.admission._pending) == (0, 0, 0)

    run(test, scorer)


def test_a_lost_device_fails_a_request_with_several_queries(caplog: pytest.LogCaptureFixture) -> None:
    class Lost(FakeScorer):
        def score(self, batch: list[Slice]) -> list[float]:
            raise DeviceLostError("the device failed", retry_after=10)

    async def test(batcher: Batcher) -> None:
        with pytest.raises(DeviceLostError):
            await batcher.rerank_all(pairs(30), 30)
        with pytest.raises(NotReadyError):
            await batcher.rerank_all(pairs(30), 30)
        assert batcher.admission.requests == 0

    run(test, Lost(max_batch_tokens=400))
    assert "never retrieved" not in caplog.text


def test_a_pass_that_may_overlap_starts_before_the_one_before_it_ends() -> None:
    """At most two run; the speed of overlapping passes is that of both together."""
    scorer = FakeScorer(max_batch_tokens=PREFIX + 4)
    scorer.lanes = FakeLanes()
    score, running, most = scorer.score, 0, 0
    lock = threading.Lock()

    def count(batch: list[Slice]) -> list[float]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        logits = score(batch)
        with lock:
            running -= 1
        return logits

    scorer.score = count  # type: ignore[method-assign]

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(4))
        rest = [asyncio.create_task(batcher.rerank(ask(12), 30))]
        while len(scorer.passes) < 2:  # the second one starts although the first one is held
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.02)
        assert (len(scorer.passes), first.done()) == (2, False)
        scorer.hold.set()
        assert (await first).logits == [1.0] * 4
        assert (await rest[0]).logits == [1.0] * 12
        assert most == 2
        assert batcher.admission.tokens_per_second > 0

    run(test, scorer)


def test_a_pass_that_is_not_full_starts_as_soon_as_a_lane_is_idle() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX + 4)
    lanes = scorer.lanes = FakeLanes()
    lanes.idle = True  # as before the pass is in the lanes

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(4))
        [second] = await queued(batcher, ask(2))
        await asyncio.sleep(0.02)
        assert len(scorer.passes) == 1  # no lane has become idle: later requests may join it
        thread = threading.Thread(target=lanes.on_idle)
        thread.start()
        while len(scorer.passes) < 2:
            await asyncio.sleep(0.001)
        thread.join()
        assert not first.done()
        scorer.hold.set()
        assert [(await task).logits for task in (first, second)] == [[1.0] * 4, [1.0] * 2]

    run(test, scorer)


def test_a_pass_that_ends_with_the_one_before_it_does_not_count_as_if_it_took_no_time() -> None:
    """The second pass fills an idle lane for 0.2 s, and ends as soon as the first one does."""
    scorer = FakeScorer(max_batch_tokens=PREFIX + 4, seconds=0.2)
    scorer.lanes = FakeLanes()
    speeds: list[float] = []

    async def test(batcher: Batcher) -> None:
        batcher.admission.observe_speed = lambda tokens, seconds: speeds.append(seconds)  # type: ignore[method-assign]
        first, second = await queued(batcher, ask(4), ask(4))
        await asyncio.gather(first, second)
        assert speeds
        assert min(speeds) >= 0.1

    run(test, scorer)


def test_of_two_passes_that_overlap_one_may_fail() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX + 4)
    scorer.lanes = FakeLanes()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(4))
        requests = RerankRequest("red fish", ["poison a b c"]), ask(4)
        tasks = [asyncio.create_task(batcher.rerank(request, 30)) for request in requests]
        while len(scorer.passes) < 2:
            await asyncio.sleep(0.001)
        scorer.hold.set()
        assert (await first).logits == [1.0] * 4
        with pytest.raises(ScoringError):
            await tasks[0]
        assert (await tasks[1]).logits == [1.0] * 4

    run(test, scorer)
