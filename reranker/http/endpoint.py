"""The way that every dialect shares: from a checked body to a ranking, and from its rendering to the answer.

A dialect is one module beside this one: its wire models, and a function that renders a `Ranking`. It never scores.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from pydantic_core import to_json
from starlette.responses import Response

from reranker.engine.scores import sigmoid
from reranker.errors import NotReadyError
from reranker.request.parse import ParsedRequest
from reranker.scheduler.batcher import Batcher
from reranker.types import RerankRequest, RerankResult


@dataclass(frozen=True, slots=True)
class Ranking:
    """All that a dialect needs to render its answer."""

    asked: ParsedRequest
    result: RerankResult
    best: list[tuple[int, float]]
    """(document index, score), best first, `top_k` of them; the score is a probability, or the logit if asked for."""
    model: str
    request_id: str

    @property
    def warnings(self) -> list[str]:
        """Sentences about fields that were not read and texts that were truncated."""
        warnings = list(self.asked.warnings)
        if self.result.query_truncated:
            warnings.append("the query did not fit and was truncated; a larger MAX_SEQ_LENGTH reads more of it")
        if self.result.truncated_documents:
            warnings.append(
                f"{self.result.truncated_documents} of {len(self.asked.request.documents)} documents did not fit and "
                f"were cut; a larger max_chunks_per_doc scores more of them"
            )
        return warnings


async def rank(request: Request, asked: ParsedRequest) -> Ranking:
    """Score what a body asks for and sort it.

    Raises:
        RerankError: see `Batcher.rerank`.
    """
    model = request.app.state.batcher.require_ready().info.name
    result = await _score(request, asked.request)
    score = float if asked.raw_scores else sigmoid
    best = [(i, score(result.logits[i])) for i in order(result.logits, asked.limit)]
    return Ranking(asked, result, best, model, request.scope["state"]["request_id"])


async def _score(request: Request, query: RerankRequest) -> RerankResult:
    """A client that leaves takes its queued work along."""
    batcher: Batcher = request.app.state.batcher
    facts: dict[str, Any] = request.scope["state"]["access"]
    facts["documents"] = len(query.documents)
    work = asyncio.create_task(batcher.rerank(query, request.app.state.request_timeout))
    watch = asyncio.create_task(_watch(request, work))
    try:
        result = await work
    except asyncio.CancelledError:
        if "client" not in facts:
            raise
        raise NotReadyError("the client left") from None  # nobody reads it
    finally:
        watch.cancel()
    facts |= {
        "tokens": result.prompt_tokens,
        "truncated": result.truncated_documents,
        **({"query_truncated": 1} if result.query_truncated else {}),
        "queue_ms": round(result.timings.queue * 1000, 1),
        "inference_ms": round(result.timings.inference * 1000, 1),
    }
    return result


async def _watch(request: Request, work: asyncio.Task[RerankResult]) -> None:
    """Cancel the work when the client leaves."""
    with suppress(Exception):  # of another server's channel: nobody is there either
        while (await request.receive())["type"] != "http.disconnect":
            pass
    request.scope["state"]["access"]["client"] = "left"
    work.cancel()


def order(logits: list[float], top_k: int | None) -> list[int]:
    """Document indices, best first, ties by index; the first `top_k` of them, all when it is None or too large."""
    return sorted(range(len(logits)), key=logits.__getitem__, reverse=True)[:top_k]  # which keeps equals in order


def answer(content: object, ranking: Ranking) -> Response:
    """The 200 answer: JSON with the headers that every rerank carries; times in milliseconds."""
    return Response(to_json(content), headers=_headers(ranking), media_type="application/json")


def _headers(ranking: Ranking) -> Mapping[str, str]:
    times = ranking.result.timings
    headers = {
        "x-prompt-tokens": str(ranking.result.prompt_tokens),
        "x-truncated-documents": str(ranking.result.truncated_documents),
        "x-tokenization-time": f"{times.tokenization * 1000:.1f}",
        "x-queue-time": f"{times.queue * 1000:.1f}",
        "x-inference-time": f"{times.inference * 1000:.1f}",
        "x-total-time": f"{times.total * 1000:.1f}",
    }
    if ranking.asked.ignored:
        headers["x-ignored-fields"] = ", ".join(ranking.asked.ignored)
    if ranking.result.query_truncated:
        headers["x-truncated-query"] = "true"
    if warnings := ranking.warnings:
        headers["x-warnings"] = " | ".join(warnings)
    return headers


HEADERS: dict[str, dict[str, object]] = {
    name: {"description": text, "schema": {"type": kind}}
    for name, text, kind in (
        ("x-request-id", "Echo of the request's header, or a new id", "string"),
        ("x-prompt-tokens", "Tokens of all prompts, as the model reads them", "integer"),
        ("x-truncated-documents", "Documents that did not fit and were cut", "integer"),
        ("x-tokenization-time", "Milliseconds", "number"),
        ("x-queue-time", "Milliseconds", "number"),
        ("x-inference-time", "Milliseconds", "number"),
        ("x-total-time", "Milliseconds", "number"),
        ("x-ignored-fields", "Names of fields that are not read, comma-separated; absent if there are none", "string"),
        ("x-truncated-query", "`true` where the query did not fit and was truncated; else absent", "string"),
        ("x-warnings", "What `meta.warnings` says, joined with ` | `; absent if there is nothing to say", "string"),
    )
}
"""OpenAPI's description of the headers."""
