from __future__ import annotations

import math

import pytest

from reranker.engine.scores import per_document, sigmoid
from reranker.types import Chunk, EncodedRequest


def test_sigmoid_is_the_softmax_of_two_and_never_overflows() -> None:
    for yes, no in ((1.0, 3.0), (5.0, -2.0), (0.0, 0.0)):
        assert sigmoid(yes - no) == pytest.approx(math.exp(yes) / (math.exp(yes) + math.exp(no)))
    assert (sigmoid(1e4), sigmoid(-1e4)) == (1.0, 0.0)


def test_a_document_counts_by_its_best_chunk_and_the_first_of_equals() -> None:
    request = EncodedRequest([0], [[1]] * 6, chunks=[[0, 9], [0, 10, 20, 25], [0, 4, 8]])
    logits, best = per_document(request, [7.0, 1.0, 3.0, 2.0, 5.0, 5.0])
    assert logits == [7.0, 3.0, 5.0]
    assert best == {1: Chunk(1, 10, 20), 2: Chunk(0, 0, 4)}


def test_without_chunks_every_document_has_its_own_logit() -> None:
    assert per_document(EncodedRequest([0], [[1], [2]]), [1.0, -1.0]) == ([1.0, -1.0], {})


def test_parts_of_a_request_are_joined_in_order() -> None:
    parts = [
        EncodedRequest([0], [[1], [2]], 1, [[0, 5, 9]]),
        EncodedRequest([0], [[3]], 0, [[0, 3]]),
        EncodedRequest([0], [[4]], 1, [[0, 1]]),
    ]
    assert EncodedRequest.join(parts) == EncodedRequest([0], [[1], [2], [3], [4]], 2, [[0, 5, 9], [0, 3], [0, 1]])
    assert EncodedRequest.join([EncodedRequest([0], [[1]]), EncodedRequest([0], [[2]])]).chunks is None
