"""Many requests through one scorer: scores as one by one, in order, in full passes, read lazily."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from reranker import Scorer
from reranker.engine.budget import full_batches
from reranker.engine.scores import sigmoid
from reranker.engine.stream import rerank_many
from reranker.errors import InvalidRequestError, RerankError, ScoringError
from reranker.types import EncodedRequest, RerankRequest, RerankResult, Slice
from tests.engine.test_scorer import requests
from tests.fake import PREFIX, FakeScorer


@pytest.mark.parametrize("budget", [300, 5000])
def test_scores_equal_those_of_single_requests(budget: int, model_path: Path) -> None:
    scorer = Scorer.load(model_path, device="cpu", precision="float32", max_batch_tokens=budget)
    stream = requests(random.Random(5), 30)
    outcomes = list(rerank_many(scorer, stream))
    scorer.max_batch_tokens = 100_000
    for request, outcome in zip(stream, outcomes, strict=True):
        assert isinstance(outcome, RerankResult)
        encoded = scorer.encode(request)
        alone = scorer.rerank(request.query, request.documents, request.instruction)
        assert list(map(sigmoid, outcome.logits)) == pytest.approx(alone, abs=1e-5)
        tokens = Slice(encoded, 0, len(encoded.documents)).prompt_tokens
        assert (outcome.prompt_tokens, outcome.truncated_documents) == (tokens, len(encoded.truncated))


def run(scorer: FakeScorer, stream: list[RerankRequest] | Iterator[RerankRequest]) -> list[RerankResult | RerankError]:
    return list(rerank_many(cast("Any", scorer), stream))


def test_an_error_takes_the_place_of_its_result_only() -> None:
    stream = [
        RerankRequest("too long", ["a"]),
        RerankRequest("a b", ["a", "a b"]),
        RerankRequest("too long", ["a"]),
        RerankRequest("a", ["nan"]),
        RerankRequest("a", []),
        RerankRequest("b", ["b"]),
        RerankRequest("too long", ["a"]),
    ]
    kinds = [InvalidRequestError, [1.0, 2.0], InvalidRequestError, ScoringError, [], [1.0], InvalidRequestError]
    outcomes = run(FakeScorer(), stream)
    assert [o.logits if isinstance(o, RerankResult) else type(o) for o in outcomes] == kinds


def test_passes_are_full_and_requests_are_read_as_they_are_needed() -> None:
    scorer = FakeScorer(max_batch_tokens=PREFIX * 4 + 8)
    read = 0

    def stream() -> Iterator[RerankRequest]:
        nonlocal read
        for _ in range(100):
            read += 1
            yield RerankRequest("a", ["a b"])

    results = rerank_many(cast("Any", scorer), stream())
    next(results)
    assert read <= 13  # a pass of four, the next two, and the request that did not fit
    assert len(list(results)) == 99
    assert {len(batch) for batch in scorer.passes} == {4}


def test_an_exception_of_the_stream_is_raised() -> None:
    def stream() -> Iterator[RerankRequest]:
        yield RerankRequest("a", ["a"])
        raise OSError("the file is gone")

    with pytest.raises(OSError, match="the file is gone"):
        run(FakeScorer(), stream())


def test_batches_hold_everything_once_in_order_and_follow_changing_limits() -> None:
    rng = random.Random(3)
    for _ in range(200):
        limits = [(rng.randrange(8, 60), rng.randrange(1, 6)) for _ in range(1000)]
        stream = [
            EncodedRequest([0] * rng.randrange(1, 9), [[1] * rng.randrange(1, 30) for _ in range(rng.randrange(0, 7))])
            for _ in range(rng.randrange(6))
        ]
        upcoming = iter(limits)
        actual = list(full_batches(stream, lambda upcoming=upcoming: next(upcoming)))  # type: ignore[misc]
        flat = [(id(s.request), i) for batch in actual for s in batch for i in range(s.start, s.stop)]
        assert flat == [(id(r), i) for r in stream for i in range(len(r.documents))]
        for batch, (tokens, documents) in zip(actual, limits, strict=False):
            count = sum(s.stop - s.start for s in batch)
            assert count <= documents
            assert sum(s.tokens for s in batch) <= tokens or count == 1
