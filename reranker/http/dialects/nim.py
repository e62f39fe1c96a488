"""POST /v1/ranking of NVIDIA NIM: `passages` in, logits out, best first.

Clients: NVIDIARerank of langchain-nvidia-ai-endpoints and of llama-index; litellm's `nvidia_nim/ranking/`, which also
reads `usage.total_tokens`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any

from pydantic import BaseModel, Field

import reranker.http.dialects.cohere as cohere
from reranker.errors import InvalidRequestError
from reranker.http.dialects.route import Route
from reranker.http.ranking import Ranking
from reranker.request.fields import DOCUMENT, FIELDS, refuse
from reranker.request.names import parse_as
from reranker.request.parse import ParsedRequest
from reranker.request.schema import RANK_FIELDS, no_zero, options
from reranker.request.unread import MAX_NAMES, missing_hint, token

_NAMES = {"documents": "passages"}
_TRUNCATE: dict[object, bool] = {"END": True, "NONE": False, True: True, False: False}
"""Errors about texts that do not fit advise the values of the other routes, so they are valid too."""
_NOT_READ = ("documents", "texts", "raw_scores", "use_activation")
"""Fields of a rerank request without a meaning here: the documents are `passages`, the scores logits."""


class RankedPassage(BaseModel):
    """The rank of one passage."""

    index: int = Field(ge=0, description="Position in `passages`, from 0")
    logit: float = Field(description="The score before the sigmoid")


class Rankings(BaseModel):
    """All passages, best first."""

    rankings: list[RankedPassage]
    usage: cohere.Usage


REQUEST: dict[str, Any] = {
    "model": "any",
    "query": {"text": "what is a cat?"},
    "passages": [{"text": "a bread"}, {"text": "a small animal"}],
    "truncate": "END",
}
"""Examples for the OpenAPI document, here and below."""
RESPONSE: dict[str, Any] = {
    "rankings": [{"index": 1, "logit": 3.5}, {"index": 0, "logit": -3.9}],
    "usage": {"prompt_tokens": 171, "completion_tokens": 0, "total_tokens": 171},
}


def parse(body: Mapping[str, Any], *, max_documents: int | None = None) -> ParsedRequest:
    """Read `{"query": {"text"}, "passages": [{"text"}], "truncate"}` and the optional fields of a rerank request."""
    if body.get("passages") is None:
        sent = [name for name, value in body.items() if value is not None]
        raise InvalidRequestError(f"passages: is required{missing_hint('passages', sent)}")
    unread = {name: f"{name} is not read here" for name in _NOT_READ if body.get(name) is not None}
    common = {name: value for name, value in body.items() if name not in _NOT_READ}
    common |= {"documents": common.pop("passages"), "raw_scores": True}
    names: Mapping[str, str] = _NAMES
    query = body.get("query")
    if isinstance(query, dict):
        if not isinstance(query.get("text"), str):
            refuse("query.text", "must be a string", query.get("text"))
        for name in islice((name for name, value in query.items() if name != "text" and value is not None), MAX_NAMES):
            unread[f"query.{token(name)}"] = f"query.{token(name)} is not read"
        common["query"], names = query["text"], _NAMES | {"query": "query.text"}
    truncate = body.get("truncate")
    if truncate not in (None, ""):
        if not isinstance(truncate, (bool, str)) or truncate not in _TRUNCATE:
            raise InvalidRequestError('truncate: must be "END" or "NONE"')
        common["truncate"] = _TRUNCATE[truncate]
    return parse_as(names, common, unread, max_documents=max_documents)


def rankings(ranking: Ranking) -> dict[str, object]:
    """Render `{"rankings": [{"index", "logit"}], "usage"}`, best first."""
    return {"rankings": [{"index": i, "logit": logit} for i, logit in ranking.best], "usage": cohere.usage(ranking)}


_QUERY: dict[str, Any] = FIELDS["query"].schema
SCHEMA: dict[str, Any] = {
    "title": "NimBody",
    "description": "Rank `passages` by relevance to `query`.",
    "type": "object",
    "required": ["query", "passages"],
    "properties": options("truncate", *_NOT_READ)
    | {
        "query": {"anyOf": [_QUERY, {"type": "object", "required": ["text"], "properties": {"text": _QUERY}}]},
        "passages": {"type": "array", "minItems": 1, "items": FIELDS["documents"].schema["items"]},
        "truncate": {
            "enum": [*_TRUNCATE, "", None],
            "description": "END or true: what does not fit is truncated. NONE or false: it is an error. null: passages "
            "are truncated, a query that leaves no room for them is an error",
        },
    },
    "allOf": [no_zero(), {"if": RANK_FIELDS, "else": {"properties": {"passages": {"items": DOCUMENT}}}}],
}
"""JSON Schema of a request body."""
ROUTE = Route(
    "/v1/ranking",
    rankings,
    "ranking",
    "Rank passages: NVIDIA NIM",
    '`{"rankings": [{"index", "logit"}]}`, best first.',
    Rankings,
    {"NIM": REQUEST},
    {"NIM": RESPONSE},
    parse=parse,
    schema=SCHEMA,
)
