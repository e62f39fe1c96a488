"""The rerank routes, and which dialect a body on them speaks.

Two membership tests decide, and a native body has neither key: `texts` makes it TEI's (looked for first: a real TEI
client sends a model as well), else `model` asks for the results object on /v1/rerank and for the envelope's keys on
/api/v1/rerank. On the other paths every answer to `documents` is the results object.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic import Field, RootModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reranker.errors import NotReadyError
from reranker.http.body import read_json
from reranker.http.dialects import cohere as results
from reranker.http.dialects import native
from reranker.http.endpoint import HEADERS, Ranking, answer, rank
from reranker.http.errors import RESPONSES
from reranker.notes import Notes
from reranker.request.parse import ParsedRequest, json_schema, parse_request
from reranker.request.unread import MAX_NAMES

logger = logging.getLogger(__name__)


class Direct(APIRoute):
    """A route whose endpoint takes the request and returns the response: there is nothing to be solved or checked."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call it and send what it returns."""
        if scope["method"] != "POST":
            await super().handle(scope, receive, send)  # 405
            return
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


router = APIRouter(tags=["rerank"], route_class=Direct)


async def _rerank(request: Request, plain: Callable[[Ranking], object], model: Callable[[Ranking], object]) -> Response:
    """Read, rank, render: `plain` renders the answer to a native body, `model` the one to a body with a model."""
    request.app.state.batcher.check_capacity(request.app.state.request_timeout)
    try:
        asked = await _asked(request)
        ranking = await rank(request, asked)
    except asyncio.CancelledError:  # the server gives up on a graceful shutdown: still an answer, not a cut line
        raise NotReadyError("the service is shutting down; try again", retry_after=5) from None
    render = native.array if asked.is_tei else model if asked.has_model else plain
    return answer(render(ranking), ranking)


async def _asked(request: Request) -> ParsedRequest:
    """The body, checked.

    What else was in it does not outlive this function: unknown keys may be larger than all that is asked for, and the
    request may wait for long.
    """
    asked = parse_request(await read_json(request), max_documents=request.app.state.max_documents)
    if query := request.scope.get("query_string"):
        asked = _with_parameters(asked, query)
    if asked.warnings:
        _notes.add(asked.warnings, "in a request (noted once): ")
    return asked


def _with_parameters(asked: ParsedRequest, query: bytes) -> ParsedRequest:
    """Report the parameters of the address, of which only the token is read. Odd names may hold a token themselves."""
    parts = (part.partition(b"=") for part in query.split(b"&", MAX_NAMES)[:MAX_NAMES])
    names = dict.fromkeys(name.decode() for name, equals, _ in parts if equals and _PARAMETER.fullmatch(name))
    room = MAX_NAMES - len(asked.ignored)
    unread = tuple(name for name in names if "token" not in name.lower())[: max(0, room)]
    warnings = tuple(f"{name} in the address is not read: send it in the body" for name in unread)
    return replace(asked, ignored=asked.ignored + unread, warnings=asked.warnings + warnings)


_PARAMETER = re.compile(rb"[A-Za-z_][A-Za-z0-9_-]{0,39}")
_notes = Notes(logger.warning)
"""Of this process, for its operator: clients read the same in their answers."""


def _texts_and_about(ranking: Ranking) -> dict[str, object]:
    return native.texts(ranking) | results.about(ranking)


def _one_of(schema: dict[str, Any]) -> None:
    schema["oneOf"] = schema.pop("anyOf")


class ArrayOrResults(RootModel[list[native.Score] | results.Results], json_schema_extra=_one_of):
    """The array, or the results object."""


class TextResults(native.TextResults):
    """All results, best first; what is beside them is there when the request names a model."""

    id: str | None = Field(None, description="The x-request-id of the answer")
    model: str | None = Field(None, description="The model that is served, whatever name was asked for")
    usage: results.Usage | None = None
    meta: results.Meta | None = None


class TextResultsOrArray(RootModel[TextResults | list[native.Score]], json_schema_extra=_one_of):
    """The results with their texts, or the array."""


_NATIVE = {"query": "what is a cat?", "documents": ["a bread", "a small animal"]}
_MODEL = {**_NATIVE, "model": "any", "top_n": 1}
_TEI = {"query": "what is a cat?", "texts": ["a bread", "a small animal"]}
_ARRAY = [{"index": 1, "score": 0.97}, {"index": 0, "score": 0.02}]
_TEXTS = {"results": [{"index": 1, "relevance_score": 0.97, "text": "a small animal"}]}
_ABOUT = {
    "id": "5f2c9a1b7d3e4c60",
    "model": "Qwen/Qwen3-Reranker-0.6B",
    "usage": {"prompt_tokens": 171, "total_tokens": 171},
    "meta": {
        "api_version": {"version": "2"},
        "billed_units": {"search_units": 1},
        "tokens": {"input_tokens": 171, "output_tokens": 0},
    },
}
_RESULTS = {"results": [{"index": 1, "relevance_score": 0.97}], **_ABOUT}


def _describe(model: object, asks: dict[str, object], answers: dict[str, object]) -> dict[str, Any]:
    """OpenAPI's description of a rerank route: arguments of `router.post`. `asks` and `answers` are examples."""
    bodies = {"oneOf": [json_schema("documents"), json_schema("texts")]}
    ask, ok = ({name: {"value": value} for name, value in each.items()} for each in (asks, answers))
    answer = {"model": model, "headers": HEADERS, "content": {"application/json": {"examples": ok}}}
    return {
        "responses": {**RESPONSES, 200: answer},
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": bodies, "examples": ask}}}
        },
    }


@router.post(
    "/v1/rerank",
    summary="Rank documents: the array, or with `model` the results object",
    **_describe(
        ArrayOrResults,
        {"native": _NATIVE, "with a model": _MODEL, "TEI": _TEI},
        {"native and TEI": _ARRAY, "with a model": _RESULTS},
    ),
)
async def rerank(request: Request) -> Response:
    """`[{"index", "score"}]`, best first; with `model` in the body the results object of Cohere and Jina."""
    return await _rerank(request, native.array, results.envelope)


@router.post(
    "/api/v1/rerank",
    summary="Rank documents: results with their texts",
    **_describe(
        TextResultsOrArray,
        {"native": _NATIVE, "with a model": _MODEL, "TEI": _TEI},
        {"native": _TEXTS, "with a model": _TEXTS | _ABOUT, "TEI": _ARRAY},
    ),
)
async def rerank_with_texts(request: Request) -> Response:
    """`{"results": [{"index", "relevance_score", "text"}]}`, best first; with `model` also id, model, usage, meta."""
    return await _rerank(request, native.texts, _texts_and_about)


_SHARED = _describe(ArrayOrResults, {"Cohere, Jina, vLLM": _MODEL, "TEI": _TEI}, {"results": _RESULTS, "TEI": _ARRAY})


@router.post("/rerank", summary="Rank documents: Jina, vLLM, Infinity; TEI with `texts`", **_SHARED)
@router.post("/v2/rerank", summary="Rank documents: Cohere", **_SHARED)
@router.post("/api/v2/rerank", summary="Rank documents: Cohere", **_SHARED)
async def rerank_results(request: Request) -> Response:
    """The results object of Cohere, Jina, vLLM, Infinity; with `texts` the array of text-embeddings-inference."""
    return await _rerank(request, results.envelope, results.envelope)
