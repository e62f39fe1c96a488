"""Access tokens: a bearer header or `?access_token=`, checked before the request is read.

The name of an accepted token is the caller in the request's context, for the access log and the metrics.
Every path needs a token unless it is in `OPEN`. The comparison uses the ASGI path, because a URL depends on the Host
header.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from reranker.errors import UnauthorizedError
from reranker.http.callers import Entry
from reranker.http.errors import error_response
from reranker.http.pages import unauthorized
from reranker.http.state import context_of

OPEN = frozenset({"/", "/livez", "/readyz"})
PARAMETER = "access_token"
_HINT = f"send the header 'Authorization: Bearer <token>' or the query parameter ?{PARAMETER}=<token>, once"


class TokenAuth:
    """ASGI middleware that requires one of `tokens`, unless there are none.

    It removes the credentials from the scope, so that no later part can log them.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[Entry]) -> None:
        self.app = app
        self.callers = [(_digest(text.encode()), entry.caller) for entry in tokens for text in entry.accepted]

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
        if self.callers and scope["path"] not in OPEN:
            try:
                context_of(scope).caller = self._caller(_credentials(headers, parameters))
            except UnauthorizedError as error:
                await unauthorized(error_response(error), scope)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _caller(self, token: bytes) -> str:
        digest = _digest(token)
        # Compare all tokens, by digests of equal length, so that the time reveals nothing.
        matches = [caller for accepted, caller in self.callers if hmac.compare_digest(digest, accepted)]
        if not matches:
            raise UnauthorizedError(f"the token is wrong; {_HINT}")
        return matches[0]


def _credentials(headers: list[bytes], parameters: list[str]) -> bytes:
    """Return the token that was sent. A wrong header never falls back to the parameter.

    Raises:
        UnauthorizedError: there is none, more than one, or a header of another scheme.
    """
    if len(headers) + len(parameters) > 1:
        raise UnauthorizedError(f"more than one token was sent; {_HINT}")
    if parameters:
        return parameters[0].encode()
    if not headers:
        raise UnauthorizedError(f"no token was sent; {_HINT}")
    scheme, _, token = headers[0].partition(b" ")
    if scheme.lower() != b"bearer":
        raise UnauthorizedError(f"the Authorization header does not use the Bearer scheme; {_HINT}")
    return token.strip(b" ")


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
