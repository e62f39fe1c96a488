from __future__ import annotations

import pytest

from reranker.http.ranking import order


@pytest.mark.parametrize(
    ("logits", "top", "expected"),
    [
        ([0.1, 0.3, 0.2], None, [1, 2, 0]),
        ([0.0, 0.0, 0.0], None, [0, 1, 2]),  # ties by index
        ([1.0, 2.0, 2.0, 1.0], 3, [1, 2, 0]),
        ([50.0, 60.0], 1, [1]),  # probabilities of both round to 1: the logits still tell them apart
        ([0.1], 99, [0]),
    ],
)
def test_best_first_ties_by_index_cut_to_top_k(logits: list[float], top: int | None, expected: list[int]) -> None:
    assert order(logits, top) == expected
