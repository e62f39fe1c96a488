"""A rerank route: how it reads a body, how it renders a ranking, and its part of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from reranker.http.errors import ErrorBody, ErrorResponse, responses
from reranker.http.ranking import HEADERS, Ranking
from reranker.request.parse import ParsedRequest, parse_request
from reranker.request.schema import json_schema

Render = Callable[[Ranking], object]


class Parse(Protocol):
    """Read a JSON object; a dialect with a body of its own maps it to the common one first."""

    def __call__(self, body: Mapping[str, Any], *, max_documents: int | None) -> ParsedRequest:
        """Raise InvalidRequestError if a field is wrong."""


@dataclass(frozen=True, slots=True)
class Route:
    """One path of a dialect."""

    path: str
    render: Render
    name: str
    """The start of the operation id."""
    summary: str
    description: str
    response: object
    """Model of the 200 response."""
    requests: Mapping[str, object]
    """Examples by name, as in `responses`."""
    responses: Mapping[str, object]
    with_model: Render | None = None
    """Renders the responses to bodies with `model`, if they differ."""
    parse: Parse = parse_request
    schema: Mapping[str, Any] | None = None
    """JSON Schema of a body; None: the common one, with `documents` or `texts`."""
    error_keys: Callable[[ErrorResponse, str], dict[str, object]] | None = None
    """Returns the additional keys of an error body, from the response and the request's id."""
    error_model: type[ErrorBody] = ErrorBody

    @property
    def openapi(self) -> dict[str, Any]:
        """Arguments of `add_api_route`."""
        bodies, contents = ({name: {"value": each[name]} for name in each} for each in (self.requests, self.responses))
        schema = self.schema or {"oneOf": [json_schema("documents"), json_schema("texts")]}
        request = {"schema": schema, "examples": bodies}
        ok = {"model": self.response, "headers": HEADERS, "content": {"application/json": {"examples": contents}}}
        return {
            "methods": ["POST"],
            "name": self.name,
            "summary": self.summary,
            "description": self.description,
            "responses": {**responses(self.error_model), 200: ok},
            "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": request}}},
        }
