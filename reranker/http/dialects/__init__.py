"""The registry of rerank dialects: every route, and the dialect of each response.

A dialect is a module with its wire models and functions that render a `Ranking`; it never scores. To add one, write
the module and add its route to `ROUTES`.

Two keys of a body can select another dialect than the path's, and a native body has neither: `texts` selects the array
of text-embeddings-inference (checked first, because one of its clients also sends a model), `model` the results object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import RootModel

import reranker.http.dialects.cohere as cohere
import reranker.http.dialects.native as native
from reranker.http.dialects.tei import REQUEST as TEI_REQUEST
from reranker.http.errors import RESPONSES
from reranker.http.ranking import HEADERS, Ranking
from reranker.request.parse import json_schema


@dataclass(frozen=True, slots=True)
class Route:
    """A rerank route: its dialects and its part of the OpenAPI document."""

    path: str
    render: Callable[[Ranking], object]
    with_model: Callable[[Ranking], object]
    """The same for bodies with `model`."""
    name: str
    """The start of the operation id."""
    summary: str
    description: str
    response: object
    """Model of the 200 response."""
    requests: Mapping[str, object]
    """Examples by name, as in `responses`."""
    responses: Mapping[str, object]

    @property
    def openapi(self) -> dict[str, Any]:
        """Arguments of `add_api_route`."""
        bodies, contents = ({name: {"value": each[name]} for name in each} for each in (self.requests, self.responses))
        request = {"schema": {"oneOf": [json_schema("documents"), json_schema("texts")]}, "examples": bodies}
        ok = {"model": self.response, "headers": HEADERS, "content": {"application/json": {"examples": contents}}}
        return {
            "methods": ["POST"],
            "name": self.name,
            "summary": self.summary,
            "description": self.description,
            "responses": {**RESPONSES, 200: ok},
            "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": request}}},
        }


def render(path: str, ranking: Ranking) -> object:
    """Return the content of a response in the dialect of its path and keys."""
    if ranking.parsed.is_tei:
        return native.array(ranking)
    route = _BY_PATH[path]
    return route.with_model(ranking) if ranking.parsed.has_model else route.render(ranking)


def _one_of(schema: dict[str, Any]) -> None:
    schema["oneOf"] = schema.pop("anyOf")


class ArrayOrResults(RootModel[list[native.Score] | cohere.Results], json_schema_extra=_one_of):
    """The array, or the results object."""


class TextResultsOrArray(RootModel[native.TextResults | list[native.Score]], json_schema_extra=_one_of):
    """The results with their texts, or the array."""


_REQUESTS = {"native": native.REQUEST, "with a model": cohere.REQUEST, "TEI": TEI_REQUEST}
_RESULTS = Route(
    "/rerank",
    cohere.results,
    cohere.results,
    "rerank_results",
    "Rank documents: Jina, vLLM, Infinity; TEI with `texts`",
    "The results object of Cohere, Jina, vLLM, Infinity; with `texts` the array of text-embeddings-inference.",
    ArrayOrResults,
    {"Cohere, Jina, vLLM": cohere.REQUEST, "TEI": TEI_REQUEST},
    {"results": cohere.RESPONSE, "TEI": native.ARRAY_RESPONSE},
)
ROUTES = (
    Route(
        "/v1/rerank",
        native.array,
        cohere.results,
        "rerank",
        "Rank documents: the array, or with `model` the results object",
        '`[{"index", "score"}]`, best first; with `model` in the body the results object of Cohere and Jina.',
        ArrayOrResults,
        _REQUESTS,
        {"native and TEI": native.ARRAY_RESPONSE, "with a model": cohere.RESPONSE},
    ),
    Route(
        "/api/v1/rerank",
        native.texts,
        native.texts_with_meta,
        "rerank_with_texts",
        "Rank documents: results with their texts",
        '`{"results": [{"index", "relevance_score", "text"}]}`, best first; with `model` also id, model, usage, meta.',
        TextResultsOrArray,
        _REQUESTS,
        {
            "native": native.TEXTS_RESPONSE,
            "with a model": native.TEXTS_RESPONSE | cohere.META_RESPONSE,
            "TEI": native.ARRAY_RESPONSE,
        },
    ),
    _RESULTS,
    replace(_RESULTS, path="/v2/rerank", summary="Rank documents: Cohere"),
    replace(_RESULTS, path="/api/v2/rerank", summary="Rank documents: Cohere"),
)
_BY_PATH = {route.path: route for route in ROUTES}
