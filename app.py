"""The composition root: settings in, FastAPI application out. Nothing else reads the settings.

uvicorn app:app --host 0.0.0.0 --port 6006 --reload      for development
gunicorn -c gunicorn.conf.py app:app                     for production (what `make serve` runs)
"""

from __future__ import annotations

import asyncio
import gc
import logging
import logging.config
import os
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.routing import iter_route_contexts

from config import Settings, SettingsError, load_settings, log_config, misspelt
from reranker import __version__
from reranker.errors import ModelLoadError, NotReadyError
from reranker.http import cors, errors, health
from reranker.http import metrics_route as metrics
from reranker.http import pages as page
from reranker.http import rerank as routes
from reranker.http.access import AccessLog
from reranker.http.auth import TokenAuth, describe
from reranker.http.dialects import openai, tei
from reranker.http.limits import Limits
from reranker.http.metrics import Metrics
from reranker.scheduler.batcher import Batcher
from reranker.scheduler.compute import ScorerLike
from reranker.server.address import curl_target, is_local

logger = logging.getLogger("reranker")

BOOT_FAILURE = 3
"""gunicorn's own code: a worker that ends with it ends the whole service."""
_BACK_OFF_SECONDS = 10
_LAST_SECONDS = 2.0
_YOUNG_OBJECTS = 10_000
"""How many the garbage collector lets come between two looks: no request leaves it anything (tests/test_service.py)."""


def create_app(
    settings: Settings,
    load: Callable[[], ScorerLike] | None = None,
    on_failure: Callable[[Exception], None] | None = None,
) -> FastAPI:
    """Wire the service together.

    Args:
        settings: all of them.
        load: makes the scorer, in place of the one that the settings describe.
        on_failure: told why there is no scorer, or none any more, in place of `end_process`.
    """
    logging.config.dictConfig(log_config(settings))
    logging.captureWarnings(True)
    tokens = list(filter(None, settings.access_token.split(",")))
    # Set by gunicorn.conf.py; without a slot, the workers of an operator's own folder are told apart by process id.
    counts = Metrics(os.environ.get("PROMETHEUS_MULTIPROC_DIR"), os.environ.get("RERANKER_SLOT", str(os.getpid())))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if not tokens:
            warn_of_no_token(os.environ.get("RERANKER_LISTENERS", ""))
        batcher = Batcher(
            lambda: _for_good(load or (lambda: load_scorer(settings))),
            max_queue_tokens=settings.max_queue_tokens,
            max_requests=settings.worker_connections,
            load_timeout=settings.load_timeout,
            pass_timeout=2 * settings.request_timeout,
            cache_entries=settings.score_cache_entries,
            on_failure=on_failure or end_process,
            observer=counts,
        )
        app.state.batcher = batcher
        await batcher.start()
        if os.environ.get("RERANKER_SIBLINGS") == "1":  # set by gunicorn.conf.py: others serve, so listen when ready
            await batcher.wait_until_loaded()
            if batcher.status == "unhealthy" and on_failure is None:
                await asyncio.Event().wait()  # it must not listen beside those that serve; end_process ends it
        yield
        await batcher.stop()

    app = FastAPI(
        title="Qwen3 reranker",
        summary="Ranks documents by relevance to a query, with Qwen3-Reranker",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # page.py serves it without internet access
        redoc_url=None,
        redirect_slashes=False,  # where the token is in the address, a redirect would lose it
        # FastAPI's own would hand whole addresses to whatever tracing the environment sets up, tokens in them.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.state.max_documents = settings.max_documents
    app.state.max_values = max(1_000_000, settings.max_body_bytes // 16)
    app.state.request_timeout = settings.request_timeout
    app.state.body_timeout = settings.body_timeout  # for worker.py
    app.state.metrics = counts
    app.router.routes += routes.router.routes  # an included router looks for its route twice in every request
    for part in (openai, tei, health, metrics, page):
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
        AccessLog, metrics=counts, routes={str(context.path) for context in iter_route_contexts(app.routes)}
    )
    return app


def warn_of_no_token(listeners: str) -> None:
    """Say who can use a service without a token. `listeners` are set by gunicorn.conf.py; else they are not known."""
    if is_local(listeners):
        logger.info("ACCESS_TOKEN is not set: every program on this machine can use the service at %s", listeners)
        return
    logger.warning(
        "OPEN TO EVERYBODY: ACCESS_TOKEN is not set, so everybody who reaches %s can use this service. To close it: "
        'echo "ACCESS_TOKEN=$(openssl rand -hex 32)" >> .env (for a container: set it in its environment), and restart',
        listeners or "its port",
    )


def load_scorer(settings: Settings) -> ScorerLike:
    """The scorer that the settings describe. Imports torch, so it is called in the background."""
    logger.info("loading %s", settings.model_name_or_path or "the bundled demo model")
    if not settings.model_name_or_path:
        logger.warning(
            "MODEL_NAME_OR_PATH is not set: serving the bundled demo model, which is for trying the API only"
        )
    from reranker.engine.scorer import Scorer

    for name in ("transformers", "huggingface_hub"):  # back under the one handler of config.log_config
        logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True

    scorer = Scorer.load(**settings.load_options())
    token = " -H 'Authorization: Bearer <token>'" if settings.access_token else ""
    logger.info(
        "try it: curl %s/v1/rerank%s -H 'Content-Type: application/json' -d '%s'",
        curl_target(os.environ.get("RERANKER_LISTENERS", "")),
        token,
        '{"query": "how to compress files", "documents": ["gzip compresses files", "a game of chess"]}',
    )
    return scorer


def _for_good(load: Callable[[], ScorerLike]) -> ScorerLike:
    """Load what stays until the process ends, and let the garbage collector leave it alone.

    Else it walks through all that torch and transformers hold again and again, and every answer waits 0.2 s for it.
    """
    scorer = load()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_OBJECTS)
    return scorer


def end_process(error: Exception) -> None:
    """The model cannot be loaded, or not be used any more: say why and leave the rest to whoever started this process.

    What was accepted is lost by neither: while loading that is nothing, and who waited for a scorer was told already.
    What is still tokenised or on its way then has a moment.
    On the first boot the exit code stops the whole service; of several workers one gives it, for gunicorn stumbles over
    a second. A worker that has served, or was started later (RERANKER_RESPAWNED, set by gunicorn.conf.py), must not
    stop its healthy siblings: it ends with another code and is started again; after a failed load it waits first.
    """
    if isinstance(error, (ModelLoadError, TimeoutError, NotReadyError)):
        logger.critical("cannot serve: %s", error)
    else:
        logger.critical("cannot serve", exc_info=error)
    lost = isinstance(error, NotReadyError)  # there was a scorer
    later = os.environ.get("RERANKER_RESPAWNED") == "1"
    first = os.environ.get("RERANKER_BOOT")  # a pipe of gunicorn.conf.py that holds one byte

    def leave() -> None:
        time.sleep(_BACK_OFF_SECONDS if later and not lost else _LAST_SECONDS)  # the answers on their way get out
        logging.shutdown()
        stops = not later and not lost and bool(os.read(int(first), 1) if first else True)
        os._exit(BOOT_FAILURE if stops else 1)

    threading.Thread(target=leave, daemon=True).start()


def _from_environment() -> FastAPI:
    try:
        made = create_app(load_settings())
        for warning in misspelt():
            logger.warning(warning)
        return made
    except SettingsError as error:
        sys.exit(f"error: {error}")  # one line, no traceback


app = _from_environment()
