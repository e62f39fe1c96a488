"""The composition root: settings in, FastAPI application out. Nothing else reads the settings.

uvicorn app:app --host 0.0.0.0 --port 6006 --reload      for development
gunicorn -c gunicorn.conf.py app:app                     for production, as `make serve` does
"""

from __future__ import annotations

import asyncio
import gc
import logging
import logging.config
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from config import Settings, SettingsError, load_settings, log_config, misspelt
from reranker import __version__
from reranker.http import cors, errors, health, metrics, pages, rerank
from reranker.http.access import AccessLog
from reranker.http.auth import TokenAuth, describe
from reranker.http.callers import UNNAMED, Entry, entries
from reranker.http.client_address import ClientAddress, networks
from reranker.http.dialects import openai, tei
from reranker.http.limits import Limits
from reranker.http.metrics import Metrics
from reranker.http.state import Service
from reranker.scheduler.batcher import Batcher
from reranker.scheduler.compute import ScorerLike
from reranker.server import fleet, gpus
from reranker.server.address import curl_target, is_local
from reranker.server.fleet import end_process

logger = logging.getLogger("reranker")


def create_app(
    settings: Settings,
    load: Callable[[], ScorerLike] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Wire the service together.

    Args:
        settings: of the whole service.
        load: creates the scorer; default: `load_scorer`.
        on_failure: called with the error if the scorer cannot be loaded or is lost; default: `end_process`.
    """
    logging.config.dictConfig(log_config(settings))
    logging.captureWarnings(True)
    tokens = entries(settings.access_token)
    address = ClientAddress(settings.access_log_client, networks(settings.trusted_proxies))
    worker = fleet.context
    counts = Metrics(
        worker.folder, worker.metrics_key, {token.caller for token in tokens}, lambda: worker.wanted_workers
    )

    batcher = Batcher(
        lambda: load_and_freeze_gc(load or (lambda: load_scorer(settings))),
        max_queue_tokens=settings.max_queue_tokens,
        max_requests=settings.worker_connections,
        load_timeout=settings.load_timeout,
        pass_timeout=2 * settings.request_timeout,
        request_timeout=settings.request_timeout,
        cache_entries=settings.score_cache_entries,
        on_failure=on_failure or end_process,
        observer=counts,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if tokens:
            log_callers(tokens)
        else:
            warn_of_no_token(worker.listeners)
        counts.worker_started(replaces=worker.replaces)
        await batcher.start()
        if worker.siblings_serve:  # listen when ready
            await batcher.wait_until_loaded()
            if batcher.status == "unhealthy" and on_failure is None:
                await asyncio.Event().wait()  # never listen beside healthy siblings; end_process exits
        yield
        await batcher.stop()

    app = FastAPI(
        title="Qwen3 reranker",
        summary="Ranks documents by relevance to a query, with Qwen3-Reranker",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # pages.py serves it without internet access
        redoc_url=None,
        redirect_slashes=False,  # a redirect would lose a token in the address
        # FastAPI's tracing would record whole addresses, tokens included.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.service = Service(
        batcher=batcher,
        metrics=counts,
        client_address=address,
        max_documents=settings.max_documents,
        max_values=max(1_000_000, settings.max_body_bytes // 16),
        request_timeout=settings.request_timeout,
        body_timeout=settings.body_timeout,
    )
    app.router.routes += rerank.router.routes  # an included router would look for its route twice in every request
    for part in (openai, tei, health, metrics, pages):
        app.include_router(part.router)
    errors.install(app)
    if tokens:
        describe(app)
    # Outermost last.
    app.add_middleware(Limits, max_body_bytes=settings.max_body_bytes, body_timeout=settings.body_timeout)
    app.add_middleware(TokenAuth, tokens=tokens)
    if settings.cors_allow_origins:
        cors.install(app, settings.cors_allow_origins.split(","))
    app.add_middleware(
        AccessLog,
        metrics=counts,
        routes={str(context.path) for context in iter_route_contexts(app.routes)},
        address=address,
    )
    return app


def log_callers(tokens: Sequence[Entry]) -> None:
    """Log the number of tokens and the names of their callers, never a token."""
    named = [token.caller for token in tokens if token.caller != UNNAMED]
    names = ", ".join(sorted(set(named)))
    logger.info("access tokens: %d; with a name: %d%s", len(tokens), len(named), names and f" ({names})")


def warn_of_no_token(listeners: Sequence[str]) -> None:
    """Log who can use a service without a token."""
    where = ", ".join(listeners)
    if is_local(listeners):
        logger.info("ACCESS_TOKEN is not set: every program on this machine can use the service at %s", where)
        return
    logger.warning(
        "OPEN TO EVERYBODY: ACCESS_TOKEN is not set, so everybody who reaches %s can use this service. To close it: "
        'echo "ACCESS_TOKEN=$(openssl rand -hex 32)" >> .env (for a container: set it in its environment), and restart',
        where or "its port",
    )


def load_scorer(settings: Settings) -> ScorerLike:
    """Load the scorer that the settings describe. Slow, because it also imports torch: call it in the background."""
    logger.info("loading %s", settings.model_name_or_path or "the bundled demo model")
    if not settings.model_name_or_path:
        logger.warning(
            "MODEL_NAME_OR_PATH is not set: serving the bundled demo model, which is for trying the API only"
        )
    from reranker.engine.scorer import Scorer

    for name in ("transformers", "huggingface_hub"):  # return them to the one handler of config.log_config
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True

    share = gpus.memory_share(settings.max_memory_percentage, fleet.context.gpu_workers)
    if share < settings.max_memory_percentage:
        text = "%d workers share this GPU: each takes at most %.3g %% of its memory, not MAX_MEMORY_PERCENTAGE=%g"
        logger.info(text, fleet.context.gpu_workers, share, settings.max_memory_percentage)
    options = settings.load_options() | {"max_memory_percentage": share, "load_timeout": settings.load_timeout}
    scorer = Scorer.load(**options)
    token = " -H 'Authorization: Bearer <token>'" if settings.access_token else ""
    logger.info(
        "try it: curl %s/v1/rerank%s -H 'Content-Type: application/json' -d '%s'",
        curl_target(fleet.context.listeners),
        token,
        '{"query": "how to compress files", "documents": ["gzip compresses files", "a game of chess"]}',
    )
    return scorer


def load_and_freeze_gc(load: Callable[[], ScorerLike]) -> ScorerLike:
    """Load the scorer and exempt all objects that exist then from garbage collection.

    Otherwise full collections scan all objects of torch and transformers, and each pauses every request for 0.2 s.
    """
    scorer = load()
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # new objects between two collections; a request leaves none (tests/test_service.py)
    return scorer


try:
    app = create_app(load_settings())
    for warning in misspelt():
        logger.warning(warning)
except SettingsError as error:
    sys.exit(error.report)  # a line for each setting, no traceback
