"""State of the worker: /health for people, with the token; /livez and /readyz for orchestrators, open."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse, Response

from reranker.http.state import service_of

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The state of this worker."""

    status: Literal["ok", "loading", "draining", "unhealthy"]


@router.head("/health", include_in_schema=False)  # used by load balancers
@router.get("/health", summary="State of the service", responses={200: {"model": Health}, 503: {"model": Health}})
async def health(request: Request) -> Response:
    """200 with "ok", or 503 with the state that prevents it."""
    status = service_of(request.app).batcher.status
    if status == "ok":
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": status}, 503, {"Retry-After": "5"})


_TEXT = {"text/plain": {"schema": {"type": "string"}}}


@router.head("/livez", include_in_schema=False)
@router.get(
    "/livez",
    summary="Liveness probe",
    response_class=PlainTextResponse,
    responses={503: {"description": "Restart it", "content": _TEXT}},
)
async def livez(request: Request) -> Response:
    """503 only if a restart helps: a loading or draining worker is alive."""
    return _probe(service_of(request.app).batcher.status != "unhealthy")


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Readiness probe",
    response_class=PlainTextResponse,
    responses={503: {"description": "Send no requests", "content": _TEXT}},
)
async def readyz(request: Request) -> Response:
    """200 while the worker accepts requests."""
    return _probe(service_of(request.app).batcher.status == "ok")


def _probe(ok: bool) -> Response:
    return PlainTextResponse("ok" if ok else "not ok", 200 if ok else 503)
