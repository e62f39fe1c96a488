"""GET /metrics, for Prometheus."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from starlette.responses import Response

from reranker.http.metrics import Metrics

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics of all workers, for Prometheus",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus's text format, or OpenMetrics where the Accept header asks for it."""
    source: Metrics = request.app.state.metrics
    body, kind = await asyncio.to_thread(source.render, request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": kind})
