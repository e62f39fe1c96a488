"""The registry of rerank dialects: every route, and the dialect of each response.

A dialect is a module with its wire models and functions that render a `Ranking`; it never scores. To add one, write
the module and add its route to `ROUTES`.

Two keys of a body can select another dialect than the path's, and a native body has neither: `texts` selects the array
of text-embeddings-inference (checked first, because one of its clients also sends a model), `model` the results object.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import RootModel

import reranker.http.dialects.cohere as cohere
import reranker.http.dialects.native as native
from reranker.http.dialects.tei import REQUEST as TEI_REQUEST
from reranker.http.openapi import describe
from reranker.http.ranking import Ranking

Render = Callable[[Ranking], object]


@dataclass(frozen=True, slots=True)
class Route:
    """A rerank route: its dialects and its part of the OpenAPI document."""

    path: str
    render: Render
    openapi: dict[str, Any]
    """See `describe`."""
    summary: str
    description: str
    name: str
    """Start of the OpenAPI operation id."""
    with_model: Render | None = None
    """The dialect of bodies with `model`; None: as without."""
    with_texts: Render | None = None
    """The dialect of bodies with `texts`; None: as without."""


def render(path: str, ranking: Ranking) -> object:
    """Return the content of a response in the dialect of its path and keys."""
    route = _BY_PATH[path]
    choice = route.with_texts if ranking.parsed.is_tei else route.with_model if ranking.parsed.has_model else None
    return (choice or route.render)(ranking)


def _one_of(schema: dict[str, Any]) -> None:
    schema["oneOf"] = schema.pop("anyOf")


class ArrayOrResults(RootModel[list[native.Score] | cohere.Results], json_schema_extra=_one_of):
    """The array, or the results object."""


class TextResultsOrArray(RootModel[native.TextResults | list[native.Score]], json_schema_extra=_one_of):
    """The results with their texts, or the array."""


_BODIES = {"native": native.REQUEST, "with a model": cohere.REQUEST, "TEI": TEI_REQUEST}
_RESULTS: dict[str, Any] = {
    "render": cohere.results,
    "with_texts": native.array,
    "name": "rerank_results",
    "description": "The results object of Cohere, Jina, vLLM, Infinity; with `texts` the array of "
    "text-embeddings-inference.",
    "openapi": describe(
        ArrayOrResults,
        {"Cohere, Jina, vLLM": cohere.REQUEST, "TEI": TEI_REQUEST},
        {"results": cohere.RESPONSE, "TEI": native.ARRAY_RESPONSE},
    ),
}
ROUTES = (
    Route(
        "/v1/rerank",
        native.array,
        with_model=cohere.results,
        with_texts=native.array,
        name="rerank",
        summary="Rank documents: the array, or with `model` the results object",
        description='`[{"index", "score"}]`, best first; with `model` in the body the results object of Cohere and '
        "Jina.",
        openapi=describe(
            ArrayOrResults, _BODIES, {"native and TEI": native.ARRAY_RESPONSE, "with a model": cohere.RESPONSE}
        ),
    ),
    Route(
        "/api/v1/rerank",
        native.texts,
        with_model=native.texts_with_meta,
        with_texts=native.array,
        name="rerank_with_texts",
        summary="Rank documents: results with their texts",
        description='`{"results": [{"index", "relevance_score", "text"}]}`, best first; with `model` also id, model, '
        "usage, meta.",
        openapi=describe(
            TextResultsOrArray,
            _BODIES,
            {
                "native": native.TEXTS_RESPONSE,
                "with a model": native.TEXTS_RESPONSE | cohere.META_RESPONSE,
                "TEI": native.ARRAY_RESPONSE,
            },
        ),
    ),
    Route("/rerank", summary="Rank documents: Jina, vLLM, Infinity; TEI with `texts`", **_RESULTS),
    Route("/v2/rerank", summary="Rank documents: Cohere", **_RESULTS),
    Route("/api/v2/rerank", summary="Rank documents: Cohere", **_RESULTS),
)
_BY_PATH = {route.path: route for route in ROUTES}
