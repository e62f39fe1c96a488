"""Access tokens: a bearer header or `?access_token=`, checked before the request is read.

Every path needs a token unless it is in `OPEN`. The comparison uses the ASGI path, because a URL depends on the Host
header.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from reranker.errors import UnauthorizedError
from reranker.http.errors import error_response

OPEN = frozenset({"/", "/livez", "/readyz"})
PARAMETER = "access_token"
_HINT = f"send the header 'Authorization: Bearer <token>' or the query parameter ?{PARAMETER}=<token>, once"


class TokenAuth:
    """ASGI middleware that requires one of `tokens`, unless there are none.

    It removes the credentials from the scope, so that no later part can log them.
    """

    def __init__(self, app: ASGIApp, tokens: list[str]) -> None:
        self.app = app
        self.digests = [_digest(token.encode()) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request with a valid token on; answer all others with 401."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        parameters = [value for name, value in pairs if name == PARAMETER]
        if parameters:  # redact in place: the server's log line reads the same scope
            scope["query_string"] = redact(scope["query_string"])
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        if self.digests and scope["path"] not in OPEN and (problem := self._problem(headers, parameters)):
            await error_response(UnauthorizedError(f"{problem}; {_HINT}"))(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _problem(self, headers: list[bytes], parameters: list[str]) -> str | None:
        """Return the fault of the credentials, or None. A wrong header never falls back to the parameter."""
        if len(headers) + len(parameters) > 1:
            return "more than one token was sent"
        if headers:
            scheme, _, token = headers[0].partition(b" ")
            if scheme.lower() != b"bearer":
                return "the Authorization header does not use the Bearer scheme"
            token = token.strip(b" ")
        elif parameters:
            token = parameters[0].encode()
        else:
            return "no token was sent"
        digest = _digest(token)
        # Compare all tokens, by digests of equal length, so that the time reveals nothing.
        matches = [hmac.compare_digest(digest, accepted) for accepted in self.digests]
        return None if any(matches) else "the token is wrong"


def describe(app: FastAPI) -> None:
    """Add the token to the OpenAPI document; Swagger UI then shows its Authorize button."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        document = generate()
        body = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
        unauthorized = {"description": "No token, or a wrong one", "content": body}
        document["components"]["securitySchemes"] = {
            "header": {"type": "http", "scheme": "bearer"},
            "query": {"type": "apiKey", "in": "query", "name": PARAMETER},
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in OPEN else [{"header": []}, {"query": []}]
                if path not in OPEN:
                    operation["responses"].setdefault("401", unauthorized)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # as FastAPI documents it


def redact(query_string: bytes) -> bytes:
    """Return the query string without token values, also where the parameter's name is percent-encoded."""
    pairs = []
    for pair in query_string.split(b"&"):
        name = parse_qsl(pair.decode("latin-1"), keep_blank_values=True)
        pairs.append(f"{PARAMETER}=***".encode() if name and name[0][0] == PARAMETER else pair)
    return b"&".join(pairs)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
