"""POST /api/v1/services/rerank/text-rerank/text-rerank of Alibaba's DashScope, and its errors.

Clients: `TextReRank` of dashscope, with `dashscope.base_http_api_url = "http://host:6006/api/v1"`; llama-index's
DashScopeRerank, which is built on it; LightRAG's `ali_rerank`. A field has one place: `model` at the top, `query` and
`documents` in `input`, all others in `parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

import reranker.http.dialects.cohere as cohere
from reranker.errors import InvalidRequestError
from reranker.http.dialects.route import Route
from reranker.http.errors import ErrorBody, ErrorResponse
from reranker.http.ranking import Ranking
from reranker.request.fields import DOCUMENT, FIELDS, OPTIONAL, refuse
from reranker.request.names import parse_as
from reranker.request.parse import ParsedRequest
from reranker.request.schema import RANK_FIELDS, options

_PLACES = dict.fromkeys(OPTIONAL, "parameters") | {"model": "", "query": "input", "documents": "input"}
_NAMES = {name: f"{place}.{name}" for name, place in _PLACES.items() if place}


class Output(BaseModel):
    """All results, best first."""

    results: list[cohere.Result]


class Response(BaseModel):
    """The results and their cost."""

    output: Output
    usage: cohere.Usage
    request_id: str = Field(description="The x-request-id of the response")


class DashScopeError(ErrorBody):
    """The body of an error response, with the keys that DashScope's clients read."""

    code: str = Field(description="The same as error_type")
    request_id: str = Field(description="The x-request-id of the response")


REQUEST: dict[str, Any] = {
    "model": "qwen3-rerank",
    "input": {"query": "what is a cat?", "documents": ["a bread", "a small animal"]},
    "parameters": {"top_n": 1, "return_documents": True},
}
"""Examples for the OpenAPI document, here and below."""
RESPONSE: dict[str, Any] = {
    "output": {"results": [{"index": 1, "relevance_score": 0.97, "document": {"text": "a small animal"}}]},
    "usage": {"prompt_tokens": 171, "completion_tokens": 0, "total_tokens": 171},
    "request_id": "5f2c9a1b7d3e4c60",
}


def parse(body: Mapping[str, Any], *, max_documents: int | None = None) -> ParsedRequest:
    """Read `{"model", "input": {"query", "documents"}, "parameters"}`."""
    inputs, parameters = _object(body, "input"), _object(body, "parameters")
    if not inputs:
        raise InvalidRequestError('input: is required, an object with "query" and "documents"')
    common: dict[str, Any] = {"model": ""}  # it is optional here, so 0 means "not set" without it too
    unread: dict[str, str] = {}
    top = {name: value for name, value in body.items() if name not in ("input", "parameters")}
    for place, fields in (("", top), ("input", inputs), ("parameters", parameters)):
        for name, value in fields.items():
            if value is None:
                continue
            if name not in FIELDS or _PLACES.get(name) == place:
                common[name] = value
            else:
                path = f"{place}.{name}".lstrip(".")
                unread[path] = f"{path} is not read" + (f"; send {_NAMES[name]}" if name in _NAMES else "")
    return parse_as(_NAMES, common, unread, max_documents=max_documents)


def _object(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        refuse(name, "must be an object", value)
    return value


def output(ranking: Ranking) -> dict[str, object]:
    """Render `{"output": {"results": [{"index", "relevance_score", "document"?}]}, "usage", "request_id"}`."""
    return {
        "output": {"results": cohere.rows(ranking)},
        "usage": cohere.usage(ranking),
        "request_id": ranking.request_id,
    }


def error(response: ErrorResponse, request_id: str) -> dict[str, object]:
    """Render the keys of an error that DashScope's SDK reads beside `message`."""
    return {"code": response.error_type, "request_id": request_id}


SCHEMA: dict[str, Any] = {
    "title": "DashScopeBody",
    "description": "Rank `input.documents` by relevance to `input.query`.",
    "type": "object",
    "required": ["input"],
    "properties": {
        "model": FIELDS["model"].schema,
        "input": {
            "type": "object",
            "required": ["query", "documents"],
            "properties": {name: FIELDS[name].schema for name in ("query", "documents")},
        },
        "parameters": {"type": ["object", "null"], "properties": options("model")},
    },
    "if": {"required": ["parameters"], "properties": {"parameters": {"type": "object", **RANK_FIELDS}}},
    "else": {"properties": {"input": {"properties": {"documents": {"items": DOCUMENT}}}}},
}
"""JSON Schema of a request body."""
ROUTE = Route(
    "/api/v1/services/rerank/text-rerank/text-rerank",
    output,
    "text_rerank",
    "Rank documents: Alibaba's DashScope",
    '`{"output": {"results": [{"index", "relevance_score"}]}, "usage", "request_id"}`, best first.',
    Response,
    {"DashScope": REQUEST},
    {"DashScope": RESPONSE},
    parse=parse,
    schema=SCHEMA,
    error_keys=error,
    error_model=DashScopeError,
)
