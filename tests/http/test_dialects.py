from __future__ import annotations

from typing import Any

import pytest

from reranker.http.dialects import ROUTES, render
from reranker.http.dialects.route import Route
from reranker.http.ranking import Ranking
from reranker.request.parse import parse_request
from reranker.types import ModelInfo, RerankResult
from tests.http.test_rerank import ALL

COMMON = [route for route in ROUTES if route.parse is parse_request]


SERVED = ModelInfo("served", "cpu", "float32", 8192, 1000)


def content(route: Route, body: dict[str, Any]) -> Any:
    parsed = parse_request({"query": "q", **body})
    return render(route, Ranking.of(parsed, RerankResult([0.0, 2.0], 9, 0), SERVED, "id-1"))


@pytest.mark.parametrize("route", COMMON, ids=lambda route: route.path)
def test_path_and_keys_select_the_dialect(route: Route) -> None:
    path = route.path
    plain = content(route, {"documents": ["a", "b"]})
    with_model = content(route, {"documents": ["a", "b"], "model": "m"})
    for body in ({"texts": ["a", "b"]}, {"texts": ["a", "b"], "model": "m"}):
        assert [row["index"] for row in content(route, body)] == [1, 0]
    assert isinstance(plain, list) == (path == "/v1/rerank")
    assert set(with_model) == {"results", "id", "model", "usage", "meta"}
    assert [row["index"] for row in with_model["results"]] == [1, 0]
    assert ("text" in with_model["results"][0]) == (path == "/api/v1/rerank")
    assert (with_model["id"], with_model["model"]) == ("id-1", "served")


def test_the_routes_of_the_common_body() -> None:
    assert [route.path for route in COMMON] == ALL


def test_no_two_routes_have_one_path() -> None:
    assert len({route.path for route in ROUTES}) == len(ROUTES)
