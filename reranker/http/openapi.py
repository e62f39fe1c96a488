"""Routes without FastAPI's request handling, and their fragments of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reranker.http.errors import RESPONSES
from reranker.http.ranking import HEADERS
from reranker.request.parse import json_schema


class RawRoute(APIRoute):
    """A POST route whose endpoint maps a request to a response: FastAPI resolves and validates nothing."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the endpoint and send its response."""
        if scope["method"] != "POST":
            await super().handle(scope, receive, send)  # 405
            return
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def describe(
    name: str,
    summary: str,
    description: str,
    model: object,
    requests: Mapping[str, object],
    responses: Mapping[str, object],
) -> dict[str, Any]:
    """Return the arguments of `add_api_route` for a rerank route.

    Args:
        name: the start of the operation id.
        summary, description: for readers.
        model: of the 200 response.
        requests, responses: example contents by name.
    """
    bodies, contents = ({name: {"value": each[name]} for name in each} for each in (requests, responses))
    request = {"schema": {"oneOf": [json_schema("documents"), json_schema("texts")]}, "examples": bodies}
    ok = {"model": model, "headers": HEADERS, "content": {"application/json": {"examples": contents}}}
    return {
        "methods": ["POST"],
        "name": name,
        "summary": summary,
        "description": description,
        "responses": {**RESPONSES, 200: ok},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": request}}},
    }
