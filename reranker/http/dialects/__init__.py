"""The registry of rerank dialects: every route, and the dialect of each response.

A dialect is a module with its wire models, a function that renders a `Ranking`, and one that reads a body if it is not
the common one; it never scores. To add one, write the module with its `Route` and add that to `ROUTES`.

Two keys of a common body can select another dialect than the path's, and a native body has neither: `texts` selects the
array of text-embeddings-inference (checked first, because one of its clients also sends a model), `model` the results
object.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pydantic import RootModel

import reranker.http.dialects.cohere as cohere
import reranker.http.dialects.dashscope as dashscope
import reranker.http.dialects.native as native
import reranker.http.dialects.nim as nim
import reranker.http.dialects.score as score
from reranker.http.dialects.route import Route
from reranker.http.dialects.tei import REQUEST as TEI_REQUEST
from reranker.http.errors import EXTENSIONS
from reranker.http.ranking import Ranking


def render(route: Route, ranking: Ranking) -> object:
    """Return the content of a response in the dialect of its route and keys."""
    if ranking.parsed.is_tei:
        return native.array(ranking)
    return route.with_model(ranking) if ranking.parsed.has_model and route.with_model else route.render(ranking)


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
    "rerank_results",
    "Rank documents: Jina, vLLM, Infinity; TEI with texts",
    "The results object of Cohere, Jina, vLLM, Infinity; with `texts` the array of text-embeddings-inference.",
    ArrayOrResults,
    {"Cohere, Jina, vLLM": cohere.REQUEST, "TEI": TEI_REQUEST},
    {"results": cohere.RESPONSE, "TEI": native.ARRAY_RESPONSE},
)
ROUTES = (
    Route(
        "/v1/rerank",
        native.array,
        "rerank",
        "Rank documents: the array, or with model the results object",
        '`[{"index", "score"}]`, best first; with `model` in the body the results object of Cohere and Jina.',
        ArrayOrResults,
        _REQUESTS,
        {"native and TEI": native.ARRAY_RESPONSE, "with a model": cohere.RESPONSE},
        with_model=cohere.results,
    ),
    Route(
        "/api/v1/rerank",
        native.texts,
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
        with_model=native.texts_with_meta,
    ),
    _RESULTS,
    replace(_RESULTS, path="/v2/rerank", summary="Rank documents: Cohere"),
    replace(_RESULTS, path="/api/v2/rerank", summary="Rank documents: Cohere"),
    *(
        replace(_RESULTS, path=path, summary="Rank documents: Alibaba's compatible API, llama.cpp")
        for path in ("/v1/reranks", "/reranks", "/reranking", "/v1/reranking")
    ),
    score.ROUTE,
    replace(score.ROUTE, path="/v1/score"),
    nim.ROUTE,
    dashscope.ROUTE,
)
EXTENSIONS.update({route.path: route.error_keys for route in ROUTES if route.error_keys})
