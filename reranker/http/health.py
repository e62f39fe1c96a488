"""Is it alive, is it ready: for people (/health, with the token) and for orchestrators (/livez, /readyz, open)."""

from __future__ import annotations

from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse, Response

from reranker.scheduler.batcher import Batcher

router = APIRouter(tags=["health"])


class Health(BaseModel):
    """The state of this worker."""

    status: Literal["ok", "loading", "draining", "unhealthy"]


def _batcher(request: Request) -> Batcher:
    batcher: Batcher = request.app.state.batcher
    return batcher


@router.head("/health", include_in_schema=False)  # load balancers ask so
@router.get("/health", summary="State of the service", responses={200: {"model": Health}, 503: {"model": Health}})
async def health(request: Request) -> Response:
    """200 and "ok", or 503 with what keeps it from being so."""
    status = _batcher(request).status
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
    """503 only when a restart helps; loading and draining are alive."""
    alive = _batcher(request).status != "unhealthy"
    return PlainTextResponse("ok" if alive else "not ok", 200 if alive else 503)


@router.head("/readyz", include_in_schema=False)
@router.get(
    "/readyz",
    summary="Readiness probe",
    response_class=PlainTextResponse,
    responses={503: {"description": "Send no requests", "content": _TEXT}},
)
async def readyz(request: Request) -> Response:
    """200 when requests are welcome."""
    ready = _batcher(request).status == "ok"
    return PlainTextResponse("ok" if ready else "not ok", 200 if ready else 503)
