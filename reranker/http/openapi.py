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


def describe(model: object, requests: Mapping[str, object], responses: Mapping[str, object]) -> dict[str, Any]:
    """Return the arguments of `add_api_route` that describe a rerank route.

    Args:
        model: of the 200 response.
        requests: example bodies by name.
        responses: example contents of the 200 response by name.
    """
    request = {"schema": {"oneOf": [json_schema("documents"), json_schema("texts")]}, "examples": _examples(requests)}
    ok = {"model": model, "headers": HEADERS, "content": {"application/json": {"examples": _examples(responses)}}}
    return {
        "responses": {**RESPONSES, 200: ok},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": request}}},
    }


def _examples(values: Mapping[str, object]) -> dict[str, object]:
    return {name: {"value": value} for name, value in values.items()}
