"""The cache returns the computed scores, keeps the queue and the device idle for known ones, and stays small."""

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
from reranker.scheduler.events import NullObserver
from reranker.types import Chunk, DocumentScore, EncodedRequest, RerankRequest, RerankResult, Slice, Timings
from tests.conftest import Server, Start
from tests.fake import PREFIX, FakeScorer
from tests.http.test_metrics import once, value
from tests.scheduler.test_batcher import ask, held, queued, run

MAX_WORDS = 6
"""Of a chunk of `Reader`."""


class Reader(FakeScorer):
    """A scorer whose logits depend on every word and their order; it truncates and splits as the real one does."""

    def __init__(self) -> None:
        super().__init__()
        self.encoded: list[str] = []
        """Documents, in order."""

    def encode(self, request: RerankRequest) -> EncodedRequest:
        self.encoded += request.documents
        prefix = super().encode(replace(request, query=f"{request.instruction} / {request.query}", documents=[])).prefix
        size = min(MAX_WORDS, request.max_tokens_per_doc or MAX_WORDS)
        max_words = size * (request.max_chunks_per_doc or 1)
        documents: list[list[int]] = []
        truncated = set()
        chunks = []
        for i, ids in enumerate(super().encode(request).documents):
            if len(ids) > max_words:
                if not request.truncate:
                    raise InvalidRequestError(f"documents[{request.position(i)}]: longer than {max_words}")
                truncated.add(i)
            starts = list(range(0, min(len(ids), max_words), size))
            documents += [ids[start : start + size] for start in starts]
            chunks.append([*starts, min(len(ids), max_words)])
        split = request.max_chunks_per_doc is not None
        long = len(request.query) > len("red fish")
        if long and not request.truncate_query:
            raise InvalidRequestError("the query does not fit")
        return EncodedRequest(prefix, documents, frozenset(truncated), chunks if split else None, query_truncated=long)

    def score(self, batch: list[Slice]) -> list[float]:
        counts = super().score(batch)  # which may be NaN
        texts = [str((s.request.prefix, ids)) for s in batch for ids in s.documents]
        return [count + zlib.crc32(text.encode()) / 2**32 for count, text in zip(counts, texts, strict=True)]


class Counting(NullObserver):
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


Outcome = RerankResult | RerankError


async def outcomes(scorer: Reader, requests: Sequence[RerankRequest], **options: Any) -> list[Outcome]:
    """Send the requests one after the other; results are without timings."""
    batcher = Batcher(lambda: scorer, **options)
    await batcher.start()
    await batcher.wait_until_loaded()
    results: list[Outcome] = []
    for request in requests:
        try:
            results.append(replace(await batcher.rerank(request, 30), timings=Timings()))
        except RerankError as error:
            results.append(error)
    await batcher.stop()
    return results


@settings(max_examples=60, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=12), entries=st.integers(1, 8) | st.just(10_000))
def test_results_are_equal_with_and_without_the_cache(requests: list[RerankRequest], entries: int) -> None:
    counted, scorer = Counting(), Reader()
    results = asyncio.run(outcomes(scorer, requests, cache_entries=entries, observer=counted))
    for result, expected in zip(results, asyncio.run(outcomes(Reader(), requests)), strict=True):
        assert type(result) is type(expected)
        if isinstance(result, RerankError):
            assert str(result) == str(expected)
        else:
            assert result == expected
    scored = [request for request, result in zip(requests, results, strict=True) if isinstance(result, RerankResult)]
    assert counted.hits + counted.misses == sum(len(request.documents) for request in scored)
    if entries == 10_000:  # then every different document is computed exactly once
        equal = [replace(request, truncate_query=False) for request in scored]  # all these queries fit
        different = {replace(request, documents=(document,)) for request in equal for document in request.documents}
        assert counted.misses == len(different)
        if len(scored) == len(requests):
            assert len(scorer.encoded) == len(different)


def test_only_missing_documents_are_computed_and_equal_ones_once() -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        first = await batcher.rerank(RerankRequest("red", ["a", "b", "a"]), 30)
        second = await batcher.rerank(RerankRequest("red", ["c", "b", "c", "a"]), 30)
        assert scorer.encoded == ["a", "b", "c"]
        assert first.logits[0] == first.logits[2]
        assert second.logits[1:] == [first.logits[1], second.logits[0], first.logits[0]]
        assert second.prompt_tokens == 4 * (PREFIX + 1)
        assert second.timings.inference > 0

    run(test, scorer, cache_entries=10)


@pytest.mark.parametrize("options", [{"max_queue_tokens": 100}, {"max_requests": 2}], ids=["tokens", "requests"])
def test_known_documents_wait_for_neither_queue_nor_device(options: dict[str, Any]) -> None:
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
        with pytest.raises(QueueFullError):  # one document is missing
            await batcher.rerank(RerankRequest("red fish", ["x", "red", "new"]), 30)
        scorer.hold.set()
        await asyncio.gather(first, *waiting)

    run(test, scorer, cache_entries=10, **options)


def test_a_draining_service_answers_nothing_from_the_cache() -> None:
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
def test_a_failed_request_stores_nothing(broken: str) -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        with pytest.raises(ScoringError):
            await batcher.rerank(RerankRequest("red", ["good", broken]), 30)
        await batcher.rerank(RerankRequest("red", ["good"]), 30)
        assert scorer.encoded == ["good", broken, "good"]

    run(test, scorer, cache_entries=10)


def test_a_cancelled_request_stores_nothing() -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        first = await held(batcher, scorer, ask(words="held"))
        [cancelled] = await queued(batcher, ask(words="cancelled"))
        cancelled.cancel()
        await asyncio.gather(cancelled, return_exceptions=True)
        scorer.hold.set()
        await first
        await batcher.rerank(ask(words="cancelled"), 30)
        assert scorer.encoded == ["held", "cancelled", "cancelled"]

    run(test, scorer, cache_entries=10)


def test_the_least_recently_used_document_is_evicted() -> None:
    scorer = Reader()

    async def test(batcher: Batcher) -> None:
        for word in ("a", "b", "a", "c", "a", "b"):  # c evicts b
            await batcher.rerank(ask(words=word), 30)
        assert scorer.encoded == ["a", "b", "c", "b"]
        await batcher.rerank(RerankRequest("red fish", ["d", "e", "f", "g"]), 30)  # larger than the cache
        await batcher.rerank(RerankRequest("red fish", ["f", "g", "a"]), 30)
        assert scorer.encoded[4:] == ["d", "e", "f", "g", "a"]

    run(test, scorer, cache_entries=2)


def score_one(cache: ScoreCache, request: RerankRequest, new: DocumentScore) -> DocumentScore:
    """The score of a request's only document: the known one, else `new`."""
    [key], scores, missing = cache.lookup(request)
    if missing:
        cache.store({key: new})
    return scores.get(key, new)


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
def test_different_requests_have_different_entries(other: RerankRequest) -> None:
    cache = ScoreCache(10)
    one, two = DocumentScore(0.1, 7), DocumentScore(-1e300, 1, True, Chunk(63, 5, 2**31))
    first = RerankRequest("a", ["b c"], "i")
    assert score_one(cache, first, one) == one
    assert score_one(cache, other, two) == two
    assert score_one(cache, first, two) == one
    assert score_one(cache, other, one) == two


def test_it_uses_no_more_memory_than_its_setting_says() -> None:
    documented = re.search(r"up to (\d+) bytes", str(Settings.model_fields["score_cache_entries"].description))
    assert documented is not None
    # Just above two thirds of a power of two: the size at which a dictionary wastes the most.
    entries, documents = 11_000, 100
    scores = [DocumentScore(i / 7, 1000 + i, False, Chunk(1, 1000 + i, 2000 + i)) for i in range(documents)]
    tracemalloc.start()
    try:
        cache = ScoreCache(entries)
        for i in range(3 * entries // documents):  # several times its size, so that it evicts entries
            keys, _, _ = cache.lookup(RerankRequest("q", [f"{i} {j}" for j in range(documents)]))
            cache.store(dict(zip(keys, scores, strict=True)))
        used = tracemalloc.get_traced_memory()[1] / entries
    finally:
        tracemalloc.stop()
    assert int(documented[1]) / 2 < used < int(documented[1])


# Through gunicorn


def rerank(server: Server, **body: Any) -> tuple[bytes, dict[str, str]]:
    """The body of the response, and its headers other than times."""
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
def caching(start: Start, request: pytest.FixtureRequest) -> Server:
    """A server with a cache, which starts while the shared one does."""
    caching = start(wait=None, SCORE_CACHE_ENTRIES="1000")
    request.getfixturevalue("server")
    caching.wait_for("ok")
    return caching


def test_the_second_response_is_the_first_and_the_metrics_count_hits(caching: Server, server: Server) -> None:
    def hits(count: int) -> dict[str, float]:
        samples = once(caching, lambda s: value(s, "reranker_score_cache_documents_total", result="hit") == count)
        misses = value(samples, "reranker_score_cache_documents_total", result="miss")
        return {"misses": misses, "computed": value(samples, "reranker_batch_documents_sum")}

    first = [rerank(caching, **body) for body in DIALECTS]
    # The last body is the first in another dialect. One document of the third is four chunks.
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
