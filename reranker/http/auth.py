"""Who may enter: a bearer token in the header or `?access_token=`, checked before anything of the request is read.

Guarded by default: only the exact paths in `OPEN` are free, and the ASGI path is what is compared, never a URL that a
Host header could bend.
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
    """Pure ASGI middleware. Takes the credentials out of the scope, so that nothing behind it can log them.

    Args:
        tokens: the accepted tokens; without any, everybody may enter.
    """

    def __init__(self, app: ASGIApp, tokens: list[str]) -> None:
        self.app = app
        self.digests = [_digest(token.encode()) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let an entitled request through; answer any other with 401."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given: list[str] = []
        if scope["query_string"]:
            parameters = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True, max_num_fields=None)
            given = [value for name, value in parameters if name == PARAMETER]
        if given:
            # In place: the server's own log line reads the same scope.
            scope["query_string"] = redact(scope["query_string"])
        headers = [value for name, value in scope["headers"] if name == b"authorization"]
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"authorization"]
        if self.digests and scope["path"] not in OPEN:
            problem = self._problem(headers, given)
            if problem:
                error = UnauthorizedError(f"{problem}; {_HINT}")
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _problem(self, headers: list[bytes], parameters: list[str]) -> str | None:
        """Why the credentials do not do, or None. A wrong header never falls back to the parameter."""
        if len(headers) + len(parameters) > 1:
            return "more than one token was sent"
        if headers:
            scheme, _, token = headers[0].partition(b" ")
            if scheme.lower() != b"bearer":
                return "the Authorization header is not of the Bearer scheme"
            token = token.strip(b" ")
        elif parameters:
            token = parameters[0].encode()
        else:
            return "no token was sent"
        digest = _digest(token)
        # Every accepted token is compared, in constant time, on digests of bytes.
        matches = [hmac.compare_digest(digest, accepted) for accepted in self.digests]
        return None if any(matches) else "the token is wrong"


def describe(app: FastAPI) -> None:
    """Let the OpenAPI document say which paths want a token; Swagger UI then has its Authorize button."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        document = plain()
        body = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
        refused = {"description": "No token, or a wrong one", "content": body}
        document["components"]["securitySchemes"] = {
            "header": {"type": "http", "scheme": "bearer"},
            "query": {"type": "apiKey", "in": "query", "name": PARAMETER},
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                operation["security"] = [] if path in OPEN else [{"header": []}, {"query": []}]
                if path not in OPEN:
                    operation["responses"].setdefault("401", refused)
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to change the document


def redact(query_string: bytes) -> bytes:
    """The query string with the value of every token parameter, however its name is escaped, left out."""
    kept = []
    for pair in query_string.split(b"&"):
        name = parse_qsl(pair.decode("latin-1"), keep_blank_values=True)
        kept.append(f"{PARAMETER}=***".encode() if name and name[0][0] == PARAMETER else pair)
    return b"&".join(kept)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
