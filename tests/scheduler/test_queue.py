from __future__ import annotations

import asyncio
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from reranker.engine.scorer import Scorer
from reranker.errors import QueueFullError
from reranker.scheduler.queue import Admission, Job, TokenQueue
from reranker.types import EncodedRequest, ModelInfo, RerankRequest

LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def _loop() -> Iterator[None]:
    yield
    LOOP.close()


def job(lengths: list[int], prefix: int = 5) -> Job:
    request = EncodedRequest([0] * prefix, [[1] * n for n in lengths])
    return Job(request, LOOP.create_future(), queued_at=0.0)


def taken(queue: TokenQueue, tokens: int, documents: int = 99) -> list[tuple[Job, int, int]]:
    return [(j, s.start, s.stop) for j, s in queue.take(tokens, documents)]


def test_a_batch_is_all_that_is_pending() -> None:
    queue, a, b = TokenQueue(), job([10, 10]), job([10])
    queue.put(a)
    queue.put(b)
    assert queue.tokens == 25 + 15
    assert taken(queue, 1000) == [(b, 0, 1), (a, 0, 2)]
    assert (len(queue), queue.tokens) == (0, 0)
    assert taken(queue, 1000) == []


def test_a_small_request_is_in_the_next_batch_however_many_huge_ones_are_pending() -> None:
    queue, huge, small = TokenQueue(), [job([10] * 20) for _ in range(9)], job([10])
    for j in huge:
        queue.put(j)
    # Half for the job with the fewest pending tokens, of equal ones the older; the rest for the oldest.
    assert taken(queue, 60) == [(huge[1], 0, 2), (huge[0], 0, 3)]
    queue.put(small)
    assert taken(queue, 60) == [(small, 0, 1), (huge[1], 2, 3), (huge[0], 3, 5)]
    assert queue.tokens == sum(j.pending_tokens for j in huge)


def test_the_oldest_ends_in_time_however_many_small_ones_arrive() -> None:
    queue, old = TokenQueue(), job([10] * 12)
    queue.put(old)
    batches = 0
    while old.pending_documents:
        for _ in range(20):
            queue.put(job([10]))
        batch = queue.take(60, 99)
        assert sum(s.tokens for _, s in batch) <= 60
        batches += 1
    assert batches == 6  # of 60 tokens 30 are for small ones; 5 of a prefix and 2 documents for the oldest


def test_tokens_that_the_oldest_does_not_need_go_to_the_others() -> None:
    queue, old, other = TokenQueue(), job([10]), job([10] * 20)
    queue.put(old)
    queue.put(other)
    assert taken(queue, 60) == [(other, 0, 4), (old, 0, 1)]
    assert taken(queue, 60) == [(other, 4, 9)]


def test_only_a_document_larger_than_the_limit_exceeds_it() -> None:
    queue, a, big, b = TokenQueue(), job([10]), job([500, 10]), job([10])
    for j in (a, big, b):
        queue.put(j)
    assert taken(queue, 60) == [(b, 0, 1), (a, 0, 1)]
    queue.put(small := job([10]))
    assert taken(queue, 60) == [(small, 0, 1), (big, 0, 1)]
    assert taken(queue, 60) == [(big, 1, 2)]


def test_batches_of_one_document_alternate_between_the_smallest_and_the_oldest() -> None:
    queue, old, small, other = TokenQueue(), job([10] * 5), job([10] * 2), job([10] * 3)
    for j in (old, other, small):
        queue.put(j)
    order = [taken(queue, 60, 1)[0][0] for _ in range(10)]
    assert order == [small, old, small, old, other, old, other, old, other, old]


def test_documents_of_a_batch_are_shared_like_tokens() -> None:
    queue, old, other = TokenQueue(), job([10] * 9), job([10] * 9)
    queue.put(old)
    queue.put(other)
    assert taken(queue, 1000, 5) == [(other, 0, 3), (old, 0, 2)]
    assert taken(queue, 1000, 5) == [(other, 3, 5), (old, 2, 5)]
    assert taken(queue, 1000, 13) == [(other, 5, 9), (old, 5, 9)]


def test_cancelled_jobs_cost_nothing() -> None:
    queue, gone, stays, later = TokenQueue(), job([10]), job([10]), job([10])
    for j in (gone, stays, later):
        queue.put(j)
    gone.done.cancel()
    assert taken(queue, 30) == [(later, 0, 1), (stays, 0, 1)]
    queue.put(gone)
    queue.drop_finished()
    assert (len(queue), queue.tokens) == (0, 0)


def test_the_last_document_resolves_a_job() -> None:
    j = job([1, 1, 1])
    first, second = j.take(2), j.take(3)
    j.fill(second, [3.0])
    assert not j.done.done()
    assert math.isnan(j.logits[0])
    j.fill(first, [1.0, 2.0])
    assert j.done.done()
    assert j.logits == [1.0, 2.0, 3.0]


def test_failed_jobs_are_dropped() -> None:
    queue, a, b = TokenQueue(), job([1]), job([1])
    queue.put(a)
    queue.put(b)
    for j, left in ((a, (1, 6)), (b, (0, 0))):
        j.fail(RuntimeError("a kernel failed"))
        assert j.done.exception()
        queue.drop_finished()
        assert (len(queue), queue.tokens) == left


# Admission

INFO = ModelInfo("fake", "cpu", "float32", 8192, 1000)


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer.load(device="cpu")


@pytest.fixture
def queue() -> TokenQueue:
    return TokenQueue()


@contextmanager
def reserve(
    admission: Admission, request: RerankRequest, info: ModelInfo = INFO, seconds: float = 100
) -> Iterator[None]:
    """Accept a request as the batcher does, until the end of its tokenisation."""
    tokens = admission.estimate(request, info)
    admission.check(info.max_batch_tokens, seconds, tokens)
    with admission.reserve(tokens):
        yield


def put(queue: TokenQueue, tokens: int) -> None:
    queue.put(Job(EncodedRequest([], [[0] * tokens]), LOOP.create_future(), queued_at=0.0))


def test_pending_tokens_are_limited_by_the_setting(queue: TokenQueue) -> None:
    admission = Admission(queue, 2000, 1000)
    admission.check(1000, 100, 5000)  # nothing is pending
    put(queue, 1400)
    admission.check(1000, 100, 600)
    with pytest.raises(QueueFullError, match="about 1400 tokens are pending; try again in 1 s"):
        admission.check(1000, 100, 601)


def test_small_requests_are_counted_among_themselves(queue: TokenQueue) -> None:
    admission = Admission(queue, 2000, 1000)
    put(queue, 100_000)
    for _ in range(4):
        admission.check(1000, 100, 500)
        put(queue, 500)
    for tokens in (1, 501):
        with pytest.raises(QueueFullError):
            admission.check(1000, 100, tokens)


def test_a_request_that_cannot_be_scored_in_time_is_refused(queue: TokenQueue) -> None:
    admission = Admission(queue, 1_000_000, 1000)
    put(queue, 30_000)
    admission.check(1000, 100, 30_000)
    admission.observe_speed(1000, 1.0)
    admission.check(1000, 100, 10_000)  # 40 s of work in 100 s, half of the speed
    with pytest.raises(QueueFullError) as caught:
        admission.check(1000, 100, 10_001)
    assert caught.value.retry_after == 30
    admission.check(1000, 200, 10_001)
    for _ in range(50):  # faster now
        admission.observe_speed(1000, 0.1)
    admission.check(1000, 100, 300_000)
    put(queue, 10_000_000)
    with pytest.raises(QueueFullError) as caught:
        admission.check(1000, 100, 1000)
    assert caught.value.retry_after == 60


def test_a_request_is_pending_while_it_is_tokenised(queue: TokenQueue) -> None:
    admission = Admission(queue, 1000, 1000)
    request = RerankRequest("q" * 100, ["d" * 1000, "d" * 1000])  # 744 tokens at 0.3 a character, with the prompt
    with reserve(admission, request):
        with pytest.raises(QueueFullError, match="about 745 tokens are pending"), reserve(admission, request):
            pytest.fail("it was accepted")
        admission.check(1000, 100, 255)
    with reserve(admission, request):
        pass


def test_tokens_per_character_are_learned(queue: TokenQueue) -> None:
    admission = Admission(queue, 1000, 1000)
    request = RerankRequest("q", ["d" * 1000])
    put(queue, 500)

    def fits() -> bool:
        try:
            with reserve(admission, request):
                return True
        except QueueFullError:
            return False

    assert fits()
    for _ in range(20):  # as in Chinese
        admission.observe_tokens(request, EncodedRequest([0] * 10, [[0] * 700]), INFO)
    assert not fits()
    for _ in range(20):  # truncated texts do not count
        admission.observe_tokens(request, EncodedRequest([0] * 10, [[0]], frozenset({0})), INFO)
    assert not fits()
    for _ in range(20):
        admission.observe_tokens(request, EncodedRequest([0] * 10, [[0] * 200]), INFO)
    assert fits()


@pytest.mark.parametrize(
    ("chunks", "tokens"), [(None, 8192), (1, 8192), (2, 16_384), (64, 524_288), (10**20, 524_288), (10**400, 524_288)]
)
def test_no_document_counts_for_more_than_the_model_reads(queue: TokenQueue, chunks: int | None, tokens: int) -> None:
    admission = Admission(queue, 600_000, 1000)
    request = RerankRequest("", ["d" * 2_000_000], max_chunks_per_doc=chunks)
    with reserve(admission, request), pytest.raises(QueueFullError) as caught:
        admission.check(1000, 100, 600_000)
    [waiting] = map(int, re.findall(r"about (\d+) tokens", str(caught.value)))
    assert tokens <= waiting <= tokens + 92  # 300 characters of prompt


@pytest.mark.parametrize("documents", [["blue shoes"], [""] * 1000], ids=["one short document", "empty documents"])
def test_short_texts_do_not_raise_the_estimate_for_long_ones(
    queue: TokenQueue, scorer: Scorer, documents: list[str]
) -> None:
    admission = Admission(queue, 100_000, 1000)
    short, long = RerankRequest("red shoes", documents), RerankRequest("what is it?", ["a text of words " * 60] * 100)
    for _ in range(30):
        admission.observe_tokens(short, scorer.encode(short), scorer.info)
    tokens = scorer.encode(long).tokens
    put(queue, 100_000 - 2 * tokens)
    with reserve(admission, long, scorer.info):
        pass
    put(queue, 3 * tokens // 2)  # half of it would fit, so a low estimate would accept it
    with pytest.raises(QueueFullError), reserve(admission, long, scorer.info):
        pytest.fail("it was accepted")


def test_a_query_after_the_document_counts_for_every_document(queue: TokenQueue) -> None:
    last = replace(INFO, repeats_query=True)
    many = RerankRequest("a query " * 100, ["d"] * 50)
    admission = Admission(queue, 100_000, 1000)
    tokens = admission.estimate(many, last)
    assert tokens > 50 * 800 * 0.3 > 10 * admission.estimate(many, INFO)
    one = RerankRequest("q", ["d" * 10_000])
    before = admission.estimate(one, last)
    for _ in range(20):
        admission.observe_tokens(many, EncodedRequest([0] * 80, [[0] * ((tokens - 80) // 50)] * 50), last)
    assert admission.estimate(one, last) == pytest.approx(before, rel=0.05)


def test_chunks_count_for_all_that_the_model_reads(queue: TokenQueue) -> None:
    admission = Admission(queue, 10_000, 1000)
    put(queue, 1000)
    with reserve(admission, RerankRequest("q", ["d" * 10_000_000])):
        pass
    with (
        pytest.raises(QueueFullError),
        reserve(admission, RerankRequest("q", ["d" * 10_000_000], max_chunks_per_doc=2)),
    ):
        pytest.fail("it was accepted")


def test_requests_in_progress_are_limited(queue: TokenQueue) -> None:
    admission = Admission(queue, 1000, 2)
    admission.requests = 1
    admission.check(1000, 100)
    admission.requests = 2
    with pytest.raises(QueueFullError, match="2 requests are in progress; try again in 1 s"):
        admission.check(1000, 100)
