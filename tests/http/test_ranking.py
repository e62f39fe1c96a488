from __future__ import annotations

import pytest

from reranker.http.ranking import Ranking, order
from reranker.request.parse import parse_request
from reranker.types import ModelInfo, RerankResult


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


def test_equal_documents_have_equal_scores_and_the_order_of_the_request() -> None:
    parsed = parse_request({"query": "q", "documents": ["a", "b", "a", {"text": "a"}], "raw_scores": True})
    model = ModelInfo("m", "cpu", "float32", 8192, 1000)
    ranking = Ranking.of(parsed, RerankResult([1.0, 1.5, 1.0000001, 1.0000002], 9, 0), model, "id")
    assert ranking.best == [(1, 1.5), (0, 1.0), (2, 1.0), (3, 1.0)]


@pytest.mark.parametrize(
    ("instruction", "reads", "said"), [("Find code", False, 1), ("Find code", True, 0), (None, False, 0)]
)
def test_an_instruction_that_the_prompt_has_no_place_for_is_reported(
    instruction: str | None, reads: bool, said: int
) -> None:
    model = ModelInfo("m", "cpu", "float32", 8192, 1000, reads_instruction=reads)
    parsed = parse_request({"query": "q", "documents": ["a"], "instruction": instruction, "extra": 1})
    ranking = Ranking.of(parsed, RerankResult([0.0], 9, 0), model, "id")
    assert ranking.headers["x-ignored-fields"].split(", ") == ["extra", "instruction"][: 1 + said]
    assert sum("instruction is not read" in warning for warning in ranking.warnings) == said
