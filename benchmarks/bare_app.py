"""FastAPI alone under the same worker: reads a request's JSON, checks nothing, returns one score per document."""

from __future__ import annotations

import json
import logging.config
from types import SimpleNamespace

from fastapi import FastAPI, Request
from starlette.responses import Response

from config import load_settings, log_config
from reranker.http.client_address import ClientAddress

logging.config.dictConfig(log_config(load_settings()))
app = FastAPI()
# The fields of reranker.http.state.Service that the worker reads.
app.state.service = SimpleNamespace(
    batcher=SimpleNamespace(status="ok", drain=lambda: None),
    metrics=SimpleNamespace(refused=lambda status, error_type: None),
    body_timeout=20.0,
    client_address=ClientAddress("none"),
)


@app.get("/readyz")
async def readyz() -> str:
    """Always."""
    return "ok"


@app.post("/v1/rerank")
async def rerank(request: Request) -> Response:
    """An array as long as the documents."""
    body = json.loads(await request.body())
    scores = [{"index": i, "score": 0.5} for i in range(len(body["documents"]))]
    return Response(json.dumps(scores), media_type="application/json")
