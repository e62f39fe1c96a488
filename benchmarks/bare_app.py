"""FastAPI alone under the same worker: reads a request's JSON, checks nothing, returns one score per document."""

from __future__ import annotations

import json
import logging.config
from types import SimpleNamespace

from fastapi import FastAPI, Request
from starlette.responses import Response

from config import load_settings, log_config

logging.config.dictConfig(log_config(load_settings()))
app = FastAPI()
# Of the application, the worker wants to know these; it counts nothing here but what it refuses.
app.state.metrics = SimpleNamespace(refused=lambda status, error_type: None)
app.state.body_timeout = 20.0


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
