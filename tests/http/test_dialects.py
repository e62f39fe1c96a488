from __future__ import annotations

from typing import Any

import pytest

from reranker.http.dialects import ROUTES, render
from reranker.http.ranking import Ranking
from reranker.request.parse import parse_request
from reranker.types import RerankResult


def content(path: str, body: dict[str, Any]) -> Any:
    parsed = parse_request({"query": "q", **body})
    return render(path, Ranking.of(parsed, RerankResult([0.0, 2.0], 9, 0), "served", "id-1"))


@pytest.mark.parametrize("path", [route.path for route in ROUTES])
def test_path_and_keys_select_the_dialect(path: str) -> None:
    plain = content(path, {"documents": ["a", "b"]})
    with_model = content(path, {"documents": ["a", "b"], "model": "m"})
    for body in ({"texts": ["a", "b"]}, {"texts": ["a", "b"], "model": "m"}):
        assert [row["index"] for row in content(path, body)] == [1, 0]
    assert isinstance(plain, list) == (path == "/v1/rerank")
    assert set(with_model) == {"results", "id", "model", "usage", "meta"}
    assert [row["index"] for row in with_model["results"]] == [1, 0]
    assert ("text" in with_model["results"][0]) == (path == "/api/v1/rerank")
    assert (with_model["id"], with_model["model"]) == ("id-1", "served")


def test_no_two_routes_have_one_path() -> None:
    assert len({route.path for route in ROUTES}) == len(ROUTES)
