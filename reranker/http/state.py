"""Typed state: one `Service` per application and one `RequestContext` per request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reranker.http.callers import NONE

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.types import Scope

    from reranker.http.client_address import ClientAddress
    from reranker.http.metrics import Metrics
    from reranker.scheduler.batcher import Batcher


@dataclass(frozen=True, slots=True)
class Service:
    """The parts and limits of an application that its routes and its worker read; stored as `app.state.service`."""

    batcher: Batcher
    metrics: Metrics
    client_address: ClientAddress
    max_documents: int
    max_values: int
    """JSON values in one body."""
    request_timeout: float
    """Seconds from the complete body to the response."""
    body_timeout: float
    """Seconds from the head to the last byte of the body."""


def service_of(app: Starlette) -> Service:
    """Return the state of an application that `create_app` made."""
    service: Service = app.state.service
    return service


@dataclass(slots=True)
class RequestContext:
    """State of one request, shared by the access log, the error responses and the routes."""

    request_id: str
    caller: str = NONE
    """The name of the accepted token, or `callers.UNNAMED`; `NONE` where none was required or accepted."""
    prompt_tokens: int = 0
    """Of the scored prompts."""
    log_fields: dict[str, object] = field(default_factory=dict)
    """Sizes and times for the access log, in the order of the log line."""
    error_type: str | None = None
    error_detail: str = ""
    """The error in words, without any word of the client."""
    traceparent: str = ""
    """The accepted header of W3C Trace Context; empty: none."""
    client_disconnected: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """The headers by which a client finds its request again; every response has them."""
        return {"x-request-id": self.request_id} | ({"traceparent": self.traceparent} if self.traceparent else {})


def context_of(scope: Scope) -> RequestContext:
    """Return the context that the access log attached to a request."""
    context: RequestContext = scope["state"]["context"]
    return context
