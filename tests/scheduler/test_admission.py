from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator

import pytest

from reranker.engine.scorer import Scorer
from reranker.errors import QueueFullError
from reranker.scheduler.admission import Admission
from reranker.scheduler.queue import Job, TokenQueue
from reranker.types import EncodedRequest, ModelInfo, RerankRequest

INFO = ModelInfo("fake", "cpu", "float32", 8192, 1000)
LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def _loop() -> Iterator[None]:
    yield
    LOOP.close()


@pytest.fixture
def queue() -> TokenQueue:
    return TokenQueue()


def wait(queue: TokenQueue, tokens: int) -> None:
    queue.put(Job(EncodedRequest([], [[0] * tokens]), LOOP.create_future(), queued_at=0.0))


def test_what_waits_is_bounded_by_the_setting(queue: TokenQueue) -> None:
    admission = Admission(2000, queue)
    admission.check(1000, 100, 5000)  # while nothing waits
    wait(queue, 1400)
    admission.check(1000, 100, 600)
    with pytest.raises(QueueFullError, match="about 1400 tokens wait; try again in 1 s"):
        admission.check(1000, 100, 601)


def test_small_requests_are_counted_among_themselves(queue: TokenQueue) -> None:
    admission = Admission(2000, queue)
    wait(queue, 100_000)
    for _ in range(4):
        admission.check(1000, 100, 500)
        wait(queue, 500)
    for tokens in (1, 501):
        with pytest.raises(QueueFullError):
            admission.check(1000, 100, tokens)


def test_what_cannot_be_done_in_time_is_refused(queue: TokenQueue) -> None:
    admission = Admission(1_000_000, queue)
    wait(queue, 30_000)
    admission.check(1000, 100, 30_000)
    admission.scored(1000, 1.0)
    admission.check(1000, 100, 10_000)  # 40 s of work in 100 s, half of the speed
    with pytest.raises(QueueFullError) as caught:
        admission.check(1000, 100, 10_001)
    assert caught.value.retry_after == 30
    admission.check(1000, 200, 10_001)
    for _ in range(50):  # faster now
        admission.scored(1000, 0.1)
    admission.check(1000, 100, 300_000)
    wait(queue, 10_000_000)
    with pytest.raises(QueueFullError) as caught:
        admission.check(1000, 100, 1000)
    assert caught.value.retry_after == 60


def test_what_is_being_tokenised_holds_its_place(queue: TokenQueue) -> None:
    admission = Admission(1000, queue)
    request = RerankRequest("q" * 100, ["d" * 1000, "d" * 1000])  # 744 tokens at 0.3 a character, with the prompt
    with admission.encoding(request, INFO, 100):
        with pytest.raises(QueueFullError, match="about 745 tokens wait"), admission.encoding(request, INFO, 100):
            raise AssertionError("it was taken")
        admission.check(1000, 100, 255)
    with admission.encoding(request, INFO, 100):
        pass


def test_how_much_a_character_is_worth_is_learned(queue: TokenQueue) -> None:
    admission = Admission(1000, queue)
    request = RerankRequest("q", ["d" * 1000])
    wait(queue, 500)

    def fits() -> bool:
        try:
            with admission.encoding(request, INFO, 100):
                return True
        except QueueFullError:
            return False

    assert fits()
    for _ in range(20):  # as in Chinese
        admission.encoded(request, EncodedRequest([0] * 10, [[0] * 700]))
    assert not fits()
    for _ in range(20):  # what was cut says nothing about its length
        admission.encoded(request, EncodedRequest([0] * 10, [[0]], frozenset({0})))
    assert not fits()
    for _ in range(20):
        admission.encoded(request, EncodedRequest([0] * 10, [[0] * 200]))
    assert fits()


@pytest.mark.parametrize(
    ("chunks", "tokens"), [(None, 8192), (1, 8192), (2, 16_384), (64, 524_288), (10**20, 524_288), (10**400, 524_288)]
)
def test_no_document_counts_for_more_than_is_read_of_it(queue: TokenQueue, chunks: int | None, tokens: int) -> None:
    admission = Admission(600_000, queue)
    request = RerankRequest("", ["d" * 2_000_000], max_chunks_per_doc=chunks)
    with admission.encoding(request, INFO, 100), pytest.raises(QueueFullError) as caught:
        admission.check(1000, 100, 600_000)
    [waiting] = map(int, re.findall(r"about (\d+) tokens", str(caught.value)))
    assert tokens <= waiting <= tokens + 92  # 300 characters of prompt


@pytest.mark.parametrize("documents", [["blue shoes"], [""] * 1000], ids=["one short document", "empty documents"])
def test_short_texts_do_not_make_long_ones_look_longer(queue: TokenQueue, documents: list[str]) -> None:
    scorer = Scorer.load(device="cpu")
    admission = Admission(100_000, queue)
    short, long = RerankRequest("red shoes", documents), RerankRequest("what is it?", ["a text of words " * 60] * 100)
    for _ in range(30):
        admission.encoded(short, scorer.encode(short))
    tokens = scorer.encode(long).tokens
    wait(queue, 100_000 - 2 * tokens)
    with admission.encoding(long, scorer.info, 100):
        pass
    wait(queue, 3 * tokens // 2)  # half of it would fit: whoever takes it for less would take it
    with pytest.raises(QueueFullError), admission.encoding(long, scorer.info, 100):
        raise AssertionError("it was taken")


def test_a_document_is_no_longer_than_what_the_model_reads(queue: TokenQueue) -> None:
    admission = Admission(10_000, queue)
    wait(queue, 1000)
    with admission.encoding(RerankRequest("q", ["d" * 10_000_000]), INFO, 100):
        pass
    with (
        pytest.raises(QueueFullError),
        admission.encoding(RerankRequest("q", ["d" * 10_000_000], max_chunks_per_doc=2), INFO, 100),
    ):
        raise AssertionError("it was taken")
