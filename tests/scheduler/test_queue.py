from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import pytest

from reranker.scheduler.queue import Job, TokenQueue
from reranker.types import EncodedRequest

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


def test_clear_drops_all_jobs() -> None:
    queue, a, b = TokenQueue(), job([1]), job([1])
    queue.put(a)
    queue.put(b)
    queue.clear()
    assert (len(queue), queue.tokens) == (0, 0)
