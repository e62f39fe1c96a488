"""The handler of every rerank route: admit, read, score, render, respond."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from fastapi import APIRouter, Request
from fastapi.routing import APIRoute
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from reranker.errors import InvalidRequestError, NotReadyError
from reranker.http import body
from reranker.http.dialects import ROUTES, render
from reranker.http.dialects.route import Route
from reranker.http.ranking import Ranking
from reranker.http.state import RequestContext, context_of, service_of
from reranker.request.names import renamed
from reranker.request.parse import ParsedRequest
from reranker.types import RerankResult


class RawRoute(APIRoute):
    """A POST route whose endpoint maps a request to a response: FastAPI resolves and validates nothing."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Call the endpoint and send its response."""
        if scope["method"] != "POST":
            await super().handle(scope, receive, send)  # 405
            return
        response: Response = await self.endpoint(Request(scope, receive, send))
        await response(scope, receive, send)


def endpoint(route: Route) -> Callable[[Request], Awaitable[Response]]:
    """Return the handler of a route."""

    async def rerank(request: Request) -> Response:
        """Answer in the dialect of the route and the body's keys; see `body.read` and `Batcher.rerank` for errors."""
        service, context = service_of(request.app), context_of(request.scope)
        scorer = service.batcher.check_capacity(service.request_timeout)
        try:
            parsed = await body.read(
                request, route.parse, max_documents=service.max_documents, max_values=service.max_values
            )
            result = await _score(request, parsed, context)
        except asyncio.CancelledError:  # at the end of a graceful shutdown the server cancels pending requests
            raise NotReadyError("the service is shutting down; try again", retry_after=5) from None
        ranking = Ranking.of(parsed, result, scorer.info, context.request_id)
        content = render(route, ranking)
        return Response(to_json(content), headers=ranking.headers, media_type="application/json")

    return rerank


async def _score(request: Request, parsed: ParsedRequest, context: RequestContext) -> RerankResult:
    """Score a request, unless its client disconnects: that drops its queued work."""
    service = service_of(request.app)
    context.log_fields["documents"] = len(parsed.request.documents)
    if parsed.by_query:
        context.log_fields["queries"] = len(parsed.by_query)
        call = service.batcher.rerank_all(parsed.by_query, service.request_timeout)
    else:
        call = service.batcher.rerank(parsed.request, service.request_timeout)
    work = asyncio.create_task(call)
    watch = asyncio.create_task(_cancel_on_disconnect(request, work, context))
    try:
        result = await work
    except asyncio.CancelledError:
        if not context.client_disconnected:
            raise
        raise NotReadyError("the client disconnected") from None  # for the log only
    except InvalidRequestError as error:
        if parsed.names is None:
            raise
        raise InvalidRequestError(renamed(str(error), parsed.names)) from None
    finally:
        watch.cancel()
    context.prompt_tokens = result.prompt_tokens
    context.log_fields |= {
        "tokens": result.prompt_tokens,
        "truncated": result.truncated_documents,
        **({"query_truncated": 1} if result.query_truncated else {}),
        "queue_ms": round(result.timings.queue * 1000, 1),
        "inference_ms": round(result.timings.inference * 1000, 1),
    }
    return result


async def _cancel_on_disconnect(request: Request, work: asyncio.Task[RerankResult], context: RequestContext) -> None:
    with suppress(Exception):  # other servers raise where uvicorn sends http.disconnect
        while (await request.receive())["type"] != "http.disconnect":
            pass
    context.client_disconnected = True
    work.cancel()


router = APIRouter(tags=["rerank"], route_class=RawRoute)
for _route in ROUTES:
    router.add_api_route(_route.path, endpoint(_route), **_route.openapi)
