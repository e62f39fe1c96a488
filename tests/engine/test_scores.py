from __future__ import annotations

import math

import pytest

from reranker.engine.scores import per_document, sigmoid
from reranker.types import Chunk, DocumentScore, EncodedRequest, RerankRequest, RerankResult, Slice


def test_sigmoid_is_the_softmax_of_two_and_never_overflows() -> None:
    for yes, no in ((1.0, 3.0), (5.0, -2.0), (0.0, 0.0)):
        assert sigmoid(yes - no) == pytest.approx(math.exp(yes) / (math.exp(yes) + math.exp(no)))
    assert (sigmoid(1e4), sigmoid(-1e4)) == (1.0, 0.0)


def test_a_document_counts_by_its_best_chunk_and_the_first_of_equals() -> None:
    request = EncodedRequest([0, 0], [[1]] * 5 + [[1, 1]], frozenset({1}), [[0, 9], [0, 10, 20, 25], [0, 4, 8]])
    scores = per_document(request, [7.0, 1.0, 3.0, 2.0, 5.0, 5.0])
    assert scores == [
        DocumentScore(7.0, 3),
        DocumentScore(3.0, 9, True, Chunk(1, 10, 20)),
        DocumentScore(5.0, 7, False, Chunk(0, 0, 4)),
    ]
    result = RerankResult.of(scores)
    assert result.logits == [7.0, 3.0, 5.0]
    assert result.best_chunks == {1: Chunk(1, 10, 20), 2: Chunk(0, 0, 4)}
    assert (result.prompt_tokens, result.truncated_documents) == (Slice(request, 0, 6).prompt_tokens, 1)


def test_without_chunks_every_document_has_its_own_logit() -> None:
    request = EncodedRequest([0], [[1], [2, 3]], frozenset({0}))
    assert per_document(request, [1.0, -1.0]) == [DocumentScore(1.0, 2, True), DocumentScore(-1.0, 3)]


def test_parts_of_a_request_are_joined_in_order() -> None:
    parts = [
        EncodedRequest([0], [[1], [2]], frozenset({0}), [[0, 5, 9]]),
        EncodedRequest([0], [[3]], frozenset(), [[0, 3]]),
        EncodedRequest([0], [[4]], frozenset({0}), [[0, 1]]),
    ]
    assert EncodedRequest.join(parts) == EncodedRequest(
        [0], [[1], [2], [3], [4]], frozenset({0, 2}), [[0, 5, 9], [0, 3], [0, 1]]
    )
    whole = EncodedRequest.join([EncodedRequest([0], [[1], [2]]), EncodedRequest([0], [[3]], frozenset({0}))])
    assert whole == EncodedRequest([0], [[1], [2], [3]], frozenset({2}))


def test_a_part_of_a_request_records_its_documents_indices() -> None:
    part = RerankRequest("q", ["a", "b", "c", "d"], "i", 5, 3, truncate=False).only([1, 3]).only(range(1, 2))
    assert part == RerankRequest("q", ["d"], "i", 5, 3, truncate=False, positions=[3])
