from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator

import pytest

from reranker.service.queue import Job, TokenQueue
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


def test_a_batch_is_whatever_waits_in_order() -> None:
    queue, a, b = TokenQueue(), job([10, 10]), job([10])
    queue.put(a)
    queue.put(b)
    assert queue.tokens == 25 + 15
    assert taken(queue, 1000) == [(a, 0, 2), (b, 0, 1)]
    assert (len(queue), queue.tokens) == (0, 0)
    assert taken(queue, 1000) == []


def test_a_small_request_overtakes_a_huge_one() -> None:
    queue, huge, small = TokenQueue(), job([10] * 20), job([10])
    queue.put(huge)
    assert taken(queue, 55) == [(huge, 0, 5)]
    queue.put(small)
    assert queue.tokens == 5 + 15 * 10 + 15
    # The remainder was there first, but goes behind again after its turn.
    assert taken(queue, 55) == [(huge, 5, 10)]
    assert taken(queue, 55) == [(small, 0, 1), (huge, 10, 13)]
    assert taken(queue, 1000) == [(huge, 13, 20)]
    assert (len(queue), queue.tokens) == (0, 0)


def test_limits_hold_except_for_one_document_that_is_larger_alone() -> None:
    queue, a, big, b = TokenQueue(), job([10]), job([500, 10]), job([10])
    for j in (a, big, b):
        queue.put(j)
    assert taken(queue, 60) == [(a, 0, 1)]
    assert taken(queue, 60) == [(big, 0, 1)]
    assert taken(queue, 60, documents=1) == [(b, 0, 1)]
    assert taken(queue, 60) == [(big, 1, 2)]


def test_abandoned_jobs_cost_nothing() -> None:
    queue, gone, stays, later = TokenQueue(), job([10]), job([10]), job([10])
    for j in (gone, stays, later):
        queue.put(j)
    gone.done.cancel()
    assert taken(queue, 30) == [(stays, 0, 1), (later, 0, 1)]
    queue.put(gone)
    queue.drop_abandoned()
    assert (len(queue), queue.tokens) == (0, 0)


def test_a_job_is_done_when_its_last_document_is() -> None:
    j = job([1, 1, 1])
    first, second = j.take(2), j.take(3)
    j.fill(second, [3.0])
    assert not j.done.done()
    assert math.isnan(j.logits[0])
    j.fill(first, [1.0, 2.0])
    assert j.done.done()
    assert j.logits == [1.0, 2.0, 3.0]


def test_clear_gives_all_jobs_back() -> None:
    queue, a, b = TokenQueue(), job([1]), job([1])
    queue.put(a)
    queue.put(b)
    assert queue.clear() == [a, b]
    assert (len(queue), queue.tokens) == (0, 0)
