"""What is remembered is what was computed; what is known troubles nobody; and it stays small."""

from __future__ import annotations

import asyncio
import re
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Settings
from reranker.errors import InvalidRequestError, NotReadyError, QueueFullError, RerankError, ScoringError
from reranker.scheduler.batcher import Batcher
from reranker.scheduler.cache import ScoreCache
from reranker.scheduler.events import Observer
from reranker.types import Chunk, DocumentScore, EncodedRequest, RerankRequest, RerankResult, Slice, Timings
from tests.conftest import Server, Start
from tests.fake import PREFIX, FakeScorer
from tests.http.test_metrics import once, value
from tests.scheduler.test_batcher import ask, held, queued, run

ROOM = 6
"""Words of a document that `Reader` reads at once."""


class Reader(FakeScorer):
    """Its logits depend on every word and their order; it cuts and splits as the true one does."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        """Documents that it was to encode."""

    def encode(self, request: RerankRequest) -> EncodedRequest:
        self.asked += request.documents
        prefix = super().encode(replace(request, query=f"{request.instruction} / {request.query}", documents=[])).prefix
        size = min(ROOM, request.max_tokens_per_doc or ROOM)
        most = size * (request.max_chunks_per_doc or 1)
        documents: list[list[int]] = []
        truncated = set()
        chunks = []
        for i, ids in enumerate(super().encode(request).documents):
            if len(ids) > most:
                if not request.truncate:
                    raise InvalidRequestError(f"documents[{request.position(i)}]: longer than {most}")
                truncated.add(i)
            starts = list(range(0, min(len(ids), most), size))
            documents += [ids[start : start + size] for start in starts]
            chunks.append([*starts, min(len(ids), most)])
        split = request.max_chunks_per_doc is not None
        long = len(request.query) > len("red fish")
        if long and not request.truncate_query:
            raise InvalidRequestError("the query does not fit")
        return EncodedRequest(prefix, documents, frozenset(truncated), chunks if split else None, query_truncated=long)

    def score(self, batch: list[Slice]) -> list[float]:
        counts = super().score(batch)  # for its NaN
        texts = [str((s.request.prefix, ids)) for s in batch for ids in s.documents]
        return [count + zlib.crc32(text.encode()) / 2**32 for count, text in zip(counts, texts, strict=True)]


class Counting(Observer):
    def __init__(self) -> None:
        self.hits = self.misses = 0

    def cache_used(self, hits: int, misses: int) -> None:
        self.hits += hits
        self.misses += misses


WORDS = st.lists(st.sampled_from(["red", "fish", "a"]), max_size=9).map(" ".join)
REQUESTS = st.builds(
    RerankRequest,
    query=st.sampled_from(["red", "red fish", "fish", "a red fish"]),
    documents=st.lists(WORDS | st.just("nan"), min_size=1, max_size=5),
    instruction=st.sampled_from([None, "find", "find red"]),
    max_tokens_per_doc=st.sampled_from([None, 3]),
    max_chunks_per_doc=st.sampled_from([None, 1, 2]),
    truncate=st.booleans(),
    truncate_query=st.booleans(),
)


async def answers(
    scorer: Reader, requests: Sequence[RerankRequest], **options: Any
) -> list[RerankResult | RerankError]:
    """Without their times: of requests one after the other."""
    batcher = Batcher(lambda: scorer, **options)
    await batcher.start()
    await batcher.wait_until_loaded()
    found: list[RerankResult | RerankError] = []
    for request in requests:
        try:
            found.append(replace(await batcher.rerank(request, 30), timings=Timings()))
        except RerankError as error:
            found.append(error)
    await batcher.stop()
    return found


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=12), entries=st.integers(1, 8) | st.just(10_000))
def test_with_it_and_without_it_the_answers_are_the_same(requests: list[RerankRequest], entries: int) -> None:
    counted, scorer = Counting(), Reader()
    got = asyncio.run(answers(scorer, requests, cache_entries=entries, observer=counted))
    for result, expected in zip(got, asyncio.run(answers(Reader(), requests)), strict=True):
        assert type(result) is type(expected)
        if isinstance(result, RerankError):
            assert str(result) == str(expected)
        else:
            assert result == expected
    scored = [request for request, result in zip(requests, got, strict=True) if isinstance(result, RerankResult)]
    assert counted.hits + counted.misses == sum(len(request.documents) for request in scored)
    if entries == 10_000:  # of all that is equal, the first alone is computed, and it is computed for nobody else
        alike = [
            replace(request, truncate_query=False) for request in scored
        ]  # of a query that fits it changes nothing
        different = {replace(request, documents=(document,)) for request in alike for document in request.documents}
        assert counted.misses == len(different)
        if len(scored) == len(requests):
            assert len(scorer.asked) == len(different)


def test_only_what_is_not_known_is_computed_and_a_document_that_comes_twice_once() -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        first = await batcher.rerank(RerankRequest("red", ["a", "b", "a"]), 30)
        second = await batcher.rerank(RerankRequest("red", ["c", "b", "c", "a"]), 30)
        assert scorer.asked == ["a", "b", "c"]
        assert first.logits[0] == first.logits[2]
        assert second.logits[1:] == [first.logits[1], second.logits[0], first.logits[0]]
        assert second.prompt_tokens == 4 * (PREFIX + 1)
        assert second.timings.inference > 0

    run(test, scorer, cache_entries=10)


@pytest.mark.parametrize("options", [{"max_queue_tokens": 100}, {"max_requests": 2}], ids=["tokens", "requests"])
def test_what_is_known_waits_for_neither_queue_nor_device(options: dict[str, int]) -> None:
    scorer = FakeScorer()

    async def test(batcher: Batcher) -> None:
        known = await batcher.rerank(RerankRequest("red fish", ["red", "a fish", "x"]), 30)
        first = await held(batcher, scorer, ask(query="red"))
        waiting = await queued(batcher, RerankRequest("red", ["red " * 200]))
        with pytest.raises(QueueFullError):
            batcher.check_capacity(30)
        passes = len(scorer.passes)
        again = await batcher.rerank(RerankRequest("red fish", ["x", "red", "a fish"]), 30)
        assert again.logits == [known.logits[i] for i in (2, 0, 1)]
        assert again.prompt_tokens == known.prompt_tokens
        assert (again.timings.tokenization, again.timings.queue, again.timings.inference) == (0, 0, 0)
        assert len(scorer.passes) == passes
        with pytest.raises(QueueFullError):  # one document that is not known
            await batcher.rerank(RerankRequest("red fish", ["x", "red", "new"]), 30)
        scorer.hold.set()
        await asyncio.gather(first, *waiting)

    run(test, scorer, cache_entries=10, **options)


def test_a_service_that_stops_answers_nothing_from_memory() -> None:
    async def test(batcher: Batcher) -> None:
        await batcher.rerank(ask(), 30)
        batcher.drain()
        with pytest.raises(NotReadyError, match="draining"):
            await batcher.rerank(ask(), 30)

    run(test, FakeScorer(), cache_entries=10)


@pytest.mark.parametrize("large", ["c", "c" * 250_000], ids=["in one part", "tokenised in parts"])
def test_an_error_names_the_documents_place_in_the_clients_request(large: str) -> None:
    async def test(batcher: Batcher) -> None:
        short = RerankRequest("red", ["a", "b"], truncate=False)
        await batcher.rerank(short, 30)
        with pytest.raises(InvalidRequestError, match=r"documents\[3\]"):
            await batcher.rerank(replace(short, documents=["a", large, "b", "d " * 9, "a"]), 30)

    run(test, Reader(), cache_entries=10)


@pytest.mark.parametrize("broken", ["nan", "poison"])
def test_of_a_request_that_failed_nothing_is_remembered(broken: str) -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        with pytest.raises(ScoringError):
            await batcher.rerank(RerankRequest("red", ["good", broken]), 30)
        await batcher.rerank(RerankRequest("red", ["good"]), 30)
        assert scorer.asked == ["good", broken, "good"]

    run(test, scorer, cache_entries=10)


def test_a_client_that_leaves_takes_its_scores_along_and_the_next_computes_them() -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(words="held"))
        [left] = await queued(batcher, ask(words="left"))
        left.cancel()
        await asyncio.gather(left, return_exceptions=True)
        scorer.hold.set()
        await first
        await batcher.rerank(ask(words="left"), 30)
        assert scorer.asked == ["held", "left", "left"]

    run(test, scorer, cache_entries=10)


def test_what_nobody_asked_for_the_longest_goes_first() -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        for word in ("a", "b", "a", "c", "a", "b"):  # c takes the place of b
            await batcher.rerank(ask(words=word), 30)
        assert scorer.asked == ["a", "b", "c", "b"]
        await batcher.rerank(RerankRequest("red fish", ["d", "e", "f", "g"]), 30)  # larger than the cache
        await batcher.rerank(RerankRequest("red fish", ["f", "g", "a"]), 30)
        assert scorer.asked[4:] == ["d", "e", "f", "g", "a"]

    run(test, scorer, cache_entries=2)


async def score_one(cache: ScoreCache, request: RerankRequest, new: DocumentScore) -> DocumentScore:
    """Of a request with one document; `new` if it is not known."""

    async def score(rest: RerankRequest) -> list[DocumentScore]:
        return [new]

    [found] = await cache.scores(request, score)
    return found


@pytest.mark.parametrize(
    "other",
    [
        RerankRequest("a b", ["c"], "i"),
        RerankRequest("a", [" bc"], "i"),
        RerankRequest("a", ["b c"], None),
        RerankRequest("a", ["b c"], ""),
        RerankRequest("ia", ["b c"], ""),
        RerankRequest("a", ["b c"], "i", 5),
        RerankRequest("a", ["b c"], "i", None, 5),
        RerankRequest("a", ["b c"], "i", truncate=False),
        RerankRequest('a", null', ["b c"], "i"),
        RerankRequest("a", ["b c "], "i"),
        RerankRequest("A", ["b c"], "i"),
        RerankRequest("i", ["b c"], "a"),
        RerankRequest("a", ["b c\ud800"], "i"),
    ],
)
def test_what_differs_is_not_the_same(other: RerankRequest) -> None:
    async def main() -> None:
        cache = ScoreCache(10, Observer())
        one, two = DocumentScore(0.1, 7), DocumentScore(-1e300, 1, True, Chunk(63, 5, 2**31))
        first = RerankRequest("a", ["b c"], "i")
        assert await score_one(cache, first, one) == one
        assert await score_one(cache, other, two) == two
        assert await score_one(cache, first, two) == one
        assert await score_one(cache, other, one) == two

    asyncio.run(main())


def test_it_takes_no_more_memory_than_its_setting_says() -> None:
    said = re.search(r"up to (\d+) bytes", str(Settings.model_fields["score_cache_entries"].description))
    assert said is not None
    # A little above two thirds of a power of two: the size at which a dictionary wastes the most.
    entries, documents = 11_000, 100

    async def score(rest: RerankRequest) -> list[DocumentScore]:
        return [DocumentScore(i / 7, 1000 + i, False, Chunk(1, 1000 + i, 2000 + i)) for i in range(documents)]

    async def main() -> float:
        before = tracemalloc.get_traced_memory()[0]
        cache = ScoreCache(entries, Observer())
        for i in range(7 * entries // documents):  # several times its size, so that it has to forget
            await cache.scores(RerankRequest("q", [f"{i} {j}" for j in range(documents)]), score)
        return (tracemalloc.get_traced_memory()[1] - before) / entries

    tracemalloc.start()
    try:
        taken = asyncio.run(main())
    finally:
        tracemalloc.stop()
    assert int(said[1]) / 2 < taken < int(said[1])


# Through gunicorn


def rerank(server: Server, **body: Any) -> tuple[bytes, dict[str, str]]:
    """The body of the answer, and its headers that tell no time."""
    answer = server.client.post("/v1/rerank", json=body, headers={"X-Request-Id": "same"})
    assert answer.status_code == 200
    return answer.content, {name: answer.headers[name] for name in ("x-prompt-tokens", "x-truncated-documents")}


BODY = {"query": "how to compress files", "documents": ["gzip compresses files", "a game of chess", "word " * 500]}
DIALECTS: list[dict[str, Any]] = [
    BODY,
    BODY | {"max_tokens_per_doc": 20},
    BODY | {"max_tokens_per_doc": 20, "max_chunks_per_doc": 4, "model": "any", "return_documents": True},
    {"query": BODY["query"], "texts": BODY["documents"], "raw_scores": True},
]


@pytest.fixture(scope="module")
def caching(start: Start) -> Server:
    return start(SCORE_CACHE_ENTRIES="1000")


def test_the_second_answer_is_the_first_and_the_metrics_say_where_it_is_from(caching: Server, server: Server) -> None:
    def hits(count: int) -> dict[str, float]:
        found = once(caching, lambda s: value(s, "reranker_score_cache_documents_total", result="hit") == count)
        misses = value(found, "reranker_score_cache_documents_total", result="miss")
        return {"misses": misses, "computed": value(found, "reranker_batch_documents_sum")}

    first = [rerank(caching, **body) for body in DIALECTS]
    # The last asks for the same as the first, in another dialect. Of the third, one document is four chunks.
    assert hits(3) == {"misses": 9, "computed": 12}
    for (content, headers), body in zip(first, DIALECTS, strict=True):
        assert rerank(caching, **body) == (content, headers)
        without, its_headers = rerank(server, **body)
        assert headers == its_headers
        numbers = [[float(x) for x in re.findall(rb'score":([^,}]+)', it)] for it in (content, without)]
        assert numbers[0] == pytest.approx(numbers[1], abs=1e-4)
    assert b"best_chunk" in first[2][0]
    assert first[1][1]["x-truncated-documents"] == "1"
    assert hits(3 + 12) == {"misses": 9, "computed": 12}
    answer = caching.client.post("/v1/rerank", json=BODY)
    assert answer.headers["x-queue-time"] == answer.headers["x-inference-time"] == "0.0"
    off = once(server, lambda s: value(s, "reranker_batch_documents_sum") > 0)
    assert [value(off, "reranker_score_cache_documents_total", result=r) for r in ("hit", "miss")] == [0, 0]
