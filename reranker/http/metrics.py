"""Every Prometheus metric in one table, the counting, and GET /metrics; nothing else imports prometheus_client.

To add a metric, add a row to `TABLE` and the line that counts it.

Under gunicorn the workers share a folder (PROMETHEUS_MULTIPROC_DIR, made by gunicorn.conf.py): each writes its values
into its own files there, and the worker that serves /metrics adds them up. File names contain the worker's slot, not
its process id, so a worker continues the counts of the dead worker that it replaces, and crashes add no files. Without
a folder the metrics are those of one process.
"""

from __future__ import annotations

import asyncio
import logging
import platform
import struct
import time
from collections.abc import Callable, Collection
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Request
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.responses import Response

from reranker import __version__, errors
from reranker.http import metric_files
from reranker.http.callers import NONE, UNNAMED
from reranker.http.state import service_of
from reranker.scheduler.events import ForwardPass, Observer
from reranker.types import ModelInfo, RerankResult

logger = logging.getLogger(__name__)

OTHER = "other"
"""The route of every unknown path: clients must not be able to create label values."""

# From a cached probe to the default of REQUEST_TIMEOUT; a search page can spend about 0.1 s on reranking.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 100)
_TOKENS = (256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
_DOCUMENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

_ERROR_TYPES = (
    *dict.fromkeys(kind.error_type for kind in vars(errors).values() if hasattr(kind, "error_type")),
    "cors_refused",
)


class Row(NamedTuple):
    """A metric. `name` has no `_total`; `mode` is how a gauge combines its values of several workers."""

    name: str
    kind: type[Counter | Gauge | Histogram]
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    mode: Literal["livesum", "livemin", "livemostrecent"] = "livesum"
    zeros: tuple[str, ...] = ()
    """Values of its one label that start at 0, because to Prometheus a counter that appears with 1 has not risen."""
    late: bool = False
    """Absent until it is set first: the 0 of a worker that has no model yet, or failed, would be the minimum."""


TABLE = (
    Row("reranker_requests", Counter, "Completed requests.", ("route", "status")),
    Row("reranker_request_duration_seconds", Histogram, "Time from head to response end.", ("route",), _SECONDS),
    Row("reranker_requests_in_progress", Gauge, "Requests without a complete response."),
    Row(
        "reranker_caller_requests",
        Counter,
        "Completed requests by the name of their token; unnamed: a token without a name; none: no accepted token.",
        ("caller", "status"),
    ),
    Row(
        "reranker_caller_prompt_tokens", Counter, "Tokens of the scored prompts by the name of the token.", ("caller",)
    ),
    Row("reranker_errors", Counter, "Refused and failed requests.", ("error_type",), zeros=_ERROR_TYPES),
    Row("reranker_workers", Gauge, "Workers that gunicorn keeps running, ready or not.", mode="livemostrecent"),
    Row("reranker_ready_workers", Gauge, "Workers that accept requests."),
    Row("reranker_worker_restarts", Counter, "Workers started in place of one that had ended unasked."),
    Row("reranker_start_time_seconds", Gauge, "Unix time of the oldest living worker's start.", mode="livemin"),
    Row("reranker_build_info", Gauge, "1, with the versions.", ("version", "torch", "python"), mode="livemostrecent"),
    Row(
        "reranker_model_info",
        Gauge,
        "1 per worker that has the model. score: how a logit is computed.",
        ("model", "device", "precision", "family", "score", "version"),
    ),
    Row("reranker_demo_model_workers", Gauge, "Workers with the bundled demo model, which is for trying the API only."),
    Row("reranker_self_check_failed_workers", Gauge, "Workers whose model ranked an obvious text wrong at the start."),
    Row("reranker_device_memory_bytes", Gauge, "Device memory of the workers; on a CPU, that of the processes."),
    Row("reranker_queue_tokens", Gauge, "Tokens in the queue."),
    Row(
        "reranker_queue_limit_tokens",
        Gauge,
        "Max tokens in the queue: MAX_QUEUE_TOKENS, or what the measured speed scores in time, if that is less.",
    ),
    Row("reranker_queue_wait_seconds", Histogram, "Time of a request in the queue.", (), _SECONDS),
    Row(
        "reranker_stage_seconds", Histogram, "Time of scored requests; total includes the queue.", ("stage",), _SECONDS
    ),
    Row("reranker_documents", Counter, "Documents of scored requests, cached ones included; chunks do not count."),
    Row("reranker_truncated_documents", Counter, "Documents that did not fit and were truncated."),
    Row(
        "reranker_score_cache_documents",
        Counter,
        "Documents of scored requests: hit, from the score cache; miss, computed. Both stay 0 if the cache is off.",
        ("result",),
        zeros=("hit", "miss"),
    ),
    Row(
        "reranker_batch_token_budget",
        Gauge,
        "Max tokens in a forward pass; out of memory lowers it.",
        mode="livemin",
        late=True,
    ),
    Row("reranker_batch_tokens", Histogram, "Tokens in a forward pass, each uncached prefix once.", (), _TOKENS),
    Row("reranker_batch_documents", Histogram, "Documents in a forward pass.", (), _DOCUMENTS),
    Row("reranker_batch_duration_seconds", Histogram, "Time of a forward pass.", (), _SECONDS),
    Row("reranker_batch_utilisation_ratio", Histogram, "Tokens of a forward pass divided by the budget.", (), _RATIOS),
    Row(
        "reranker_prompt_tokens",
        Counter,
        "Tokens of the prompts as the model reads them; minus reranker_batch_tokens_sum: saved by sharing prefixes.",
    ),
)


class Metrics(Observer):
    """Counts the reports of the batcher, the access log and the protocol.

    Args:
        folder: shared by all workers of the service; None: the metrics of this process alone.
        worker: names this worker's files; unique among the living workers.
        callers: the names of the tokens. Their counts start at 0.
        wanted: returns the number of workers that the service is to have; asked at every scrape.
    """

    def __init__(
        self,
        folder: str | None = None,
        worker: str = "0",
        callers: Collection[str] = (),
        wanted: Callable[[], int] = lambda: 1,
    ) -> None:
        self.folder = folder if folder and metric_files.reserve(Path(folder), worker) else None
        self._wanted = wanted
        # The library would choose by an environment variable at import, once, and name files by process id.
        values.ValueClass = values.MultiProcessValue(lambda: worker) if self.folder else values.MutexValue
        disable_created_metrics()
        self.registry = CollectorRegistry()
        metrics = {row.name: _create(row, self.registry) for row in TABLE if not row.late}
        late = {row.name: row for row in TABLE if row.late}

        @cache  # the library's own lookup costs several times as much as the counting
        def child(name: str, *labels: object) -> Any:
            metric = metrics.get(name) or _create(late[name], self.registry)
            return metric.labels(*labels) if labels else metric

        self._child = child
        for caller in (NONE, UNNAMED, *callers):
            child("reranker_caller_requests", caller, 200)
            child("reranker_caller_prompt_tokens", caller)
        self._set_wanted()
        child("reranker_start_time_seconds").set(time.time())
        child("reranker_build_info", __version__, version("torch"), platform.python_version()).set(1)

    def _set_wanted(self) -> None:
        self._child("reranker_workers").set(self._wanted() if self.folder else 1)  # else the metrics are one worker's

    def worker_started(self, *, replaces: bool) -> None:
        """Count this worker as a restart if it replaces one that has ended."""
        self._child("reranker_worker_restarts").inc(replaces)

    def status_changed(self, status: str) -> None:
        """Count this worker as ready or not."""
        self._child("reranker_ready_workers").set(status == "ok")

    def loaded(self, info: ModelInfo, memory: int) -> None:
        """Set the gauges of the model."""
        labels = (info.name, info.device, info.precision, info.family, info.score, __version__)
        self._child("reranker_model_info", *labels).set(1)
        self._child("reranker_demo_model_workers").set(info.demo)
        self._child("reranker_self_check_failed_workers").set(info.self_check.startswith("failed"))
        self._child("reranker_batch_token_budget").set(info.max_batch_tokens)
        self._child("reranker_device_memory_bytes").set(memory)

    def queue_changed(self, tokens: int) -> None:
        """Set the size of the queue."""
        self._child("reranker_queue_tokens").set(tokens)

    def queue_limit_changed(self, tokens: float) -> None:
        """Set the limit of the queue."""
        self._child("reranker_queue_limit_tokens").set(tokens)

    def request_started(self, wait: float) -> None:
        """Count the queue time of a request, even if it fails later."""
        self._child("reranker_queue_wait_seconds").observe(wait)

    def pass_ended(self, forward_pass: ForwardPass) -> None:
        """Count a forward pass."""
        self._child("reranker_batch_tokens").observe(forward_pass.tokens)
        self._child("reranker_batch_documents").observe(forward_pass.documents)
        self._child("reranker_batch_duration_seconds").observe(forward_pass.seconds)
        self._child("reranker_batch_utilisation_ratio").observe(forward_pass.tokens / forward_pass.budget)
        self._child("reranker_prompt_tokens").inc(forward_pass.prompt_tokens)
        self._child("reranker_batch_token_budget").set(forward_pass.budget)
        self._child("reranker_device_memory_bytes").set(forward_pass.memory)

    def cache_used(self, hits: int, misses: int) -> None:
        """Count the documents of a request by their source."""
        self._child("reranker_score_cache_documents", "hit").inc(hits)
        self._child("reranker_score_cache_documents", "miss").inc(misses)

    def request_scored(self, result: RerankResult) -> None:
        """Count the times and truncated documents of a request."""
        for stage in ("tokenization", "inference", "total"):
            self._child("reranker_stage_seconds", stage).observe(getattr(result.timings, stage))
        self._child("reranker_documents").inc(len(result.logits))
        if result.truncated_documents:
            self._child("reranker_truncated_documents").inc(result.truncated_documents)

    def request_began(self) -> None:
        """Count a request as in progress."""
        self._child("reranker_requests_in_progress").inc()

    def request_ended(self, route: str, status: int, seconds: float, error_type: str | None) -> None:
        """Count a completed request. `route` is a path of the service or `OTHER`."""
        self._child("reranker_requests_in_progress").dec()
        self._child("reranker_requests", route, status).inc()
        self._child("reranker_request_duration_seconds", route).observe(seconds)
        if error_type is not None:
            self._child("reranker_errors", error_type).inc()

    def caller_served(self, caller: str, status: int, prompt_tokens: int) -> None:
        """Count a completed request and its tokens for a configured name, `UNNAMED` or `NONE`."""
        self._child("reranker_caller_requests", caller, status).inc()
        if prompt_tokens:
            self._child("reranker_caller_prompt_tokens", caller).inc(prompt_tokens)

    def refused(self, status: int, error_type: str) -> None:
        """Count a connection that was refused before it sent a request."""
        self._child("reranker_requests", OTHER, status).inc()
        self._child("reranker_caller_requests", NONE, status).inc()
        self._child("reranker_errors", error_type).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that the Accept header asks for, and its content type.

        It reads files, so it must not run on the event loop.
        """
        encode, kind = choose_encoder(accept)
        self._set_wanted()
        if self.folder:
            shared = CollectorRegistry()
            try:
                MultiProcessCollector(shared, self.folder)
                return encode(shared), kind
            except (OSError, ValueError, RuntimeError, struct.error) as error:  # for example after a clean-up of /tmp
                logger.warning("the folder of shared metrics cannot be read, so /metrics is one worker's: %s", error)
        return encode(self.registry), kind


def _create(row: Row, registry: CollectorRegistry) -> Any:
    options: dict[Any, dict[str, Any]] = {Histogram: {"buckets": row.buckets}, Gauge: {"multiprocess_mode": row.mode}}
    metric = row.kind(row.name, row.help, row.labels, registry=registry, **options.get(row.kind, {}))
    for value in row.zeros:
        metric.labels(value)
    return metric


router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Metrics of all workers, for Prometheus",
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(request: Request) -> Response:
    """Prometheus's text format, or OpenMetrics if the Accept header asks for it."""
    source = service_of(request.app).metrics
    body, kind = await asyncio.to_thread(source.render, request.headers.get("accept", ""))
    return Response(body, headers={"Content-Type": kind})
