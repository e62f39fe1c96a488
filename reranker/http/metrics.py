"""Every Prometheus metric, once; nothing else imports prometheus_client.

Under gunicorn the workers share a folder (PROMETHEUS_MULTIPROC_DIR, made by gunicorn.conf.py): each writes its values
into files of its own there, and whichever worker is asked adds all of them up. Files bear the worker's slot and not its
process id, so a worker that replaces a dead one counts on where that one stopped, and no number of crashes makes more
files. Without a folder the metrics are those of this one process.
"""

from __future__ import annotations

import logging
import os
import struct
from contextlib import suppress
from functools import cache
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, values
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from reranker import __version__, errors
from reranker.scheduler.events import ForwardPass, Observer
from reranker.types import ModelInfo, RerankResult

logger = logging.getLogger(__name__)

# From a cached probe to REQUEST_TIMEOUT's default; 0.1 s and below is what a search page can spend on reranking.
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 100)
_TOKENS = (256, 1024, 4096, 8192, 16_384, 32_768, 65_536, 131_072, 262_144)
_DOCUMENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

# Bytes of each file of values, all that every route and status can fill (tests/http/test_metrics.py fills them).
_FILES = {"counter": 1 << 18, "histogram": 1 << 18, "gauge_livesum": 1 << 16, "gauge_livemin": 1 << 16}

OTHER = "other"
"""The route of every path that the service does not have: a label must not be the client's choice."""


class Metrics(Observer):
    """Counts what the batcher and the access log report.

    Args:
        folder: shared by all workers of the service; None: the metrics of this process alone.
        worker: names this worker's files; no other living worker may have it.
    """

    def __init__(self, folder: str | None = None, worker: str = "0") -> None:
        self.folder = folder if folder and _reserve(Path(folder), worker) else None
        # The library would decide by the environment when it is imported, once, and take the process id.
        values.ValueClass = values.MultiProcessValue(lambda: worker) if self.folder else values.MutexValue
        disable_created_metrics()
        self.registry = registry = CollectorRegistry()

        self.requests = Counter("reranker_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.duration = Histogram(
            "reranker_request_duration_seconds",
            "From the head of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_progress = Gauge(
            "reranker_requests_in_progress",
            "Requests being answered.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.errors = Counter(
            "reranker_errors", "Requests refused or failed, by kind.", ["error_type"], registry=registry
        )
        for kind in vars(errors).values():  # a counter that appears with a 1 has not risen, to Prometheus
            if isinstance(kind, type) and issubclass(kind, errors.RerankError):
                self.errors.labels(kind.error_type)
        self.ready = Gauge(
            "reranker_ready_workers",
            "Workers that take requests.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.model = Gauge(
            "reranker_model_info",
            "1 for every worker that holds the model.",
            ["model", "device", "precision", "version"],
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.self_check = Gauge(
            "reranker_self_check_failed_workers",
            "Workers whose model ranked an obvious pair wrong at the start: it does not behave like a reranker.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.memory = Gauge(
            "reranker_device_memory_bytes",
            "Memory that the workers hold on their devices; on a CPU, that of the processes.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.queue_tokens = Gauge(
            "reranker_queue_tokens",
            "Tokens that wait for the device.",
            multiprocess_mode="livesum",
            registry=registry,
        )
        self.queue_wait = Histogram(
            "reranker_queue_wait_seconds",
            "From the queue to the device, by request.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "reranker_stage_seconds",
            "Where the time of scored requests went: tokenization, inference, and total with the queue.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.truncated = Counter(
            "reranker_truncated_documents", "Documents that did not fit and were cut.", registry=registry
        )
        self.cached = Counter(
            "reranker_score_cache_documents",
            "Documents of scored requests: hit, the score was known; miss, computed. None where the cache is off.",
            ["result"],
            registry=registry,
        )
        for result in ("hit", "miss"):
            self.cached.labels(result)
        self.budget = Gauge(
            "reranker_batch_token_budget",
            "Most tokens in one forward pass; lower after the device ran out of memory.",
            multiprocess_mode="livemin",
            registry=registry,
        )
        self.batch_tokens = Histogram(
            "reranker_batch_tokens",
            "Tokens in a forward pass, each prefix's own part once.",
            buckets=_TOKENS,
            registry=registry,
        )
        self.batch_documents = Histogram(
            "reranker_batch_documents", "Documents in a forward pass.", buckets=_DOCUMENTS, registry=registry
        )
        self.batch_seconds = Histogram(
            "reranker_batch_duration_seconds", "Time of a forward pass.", buckets=_SECONDS, registry=registry
        )
        self.utilisation = Histogram(
            "reranker_batch_utilisation_ratio",
            "Tokens in a forward pass by the token budget; nothing of it is padding.",
            buckets=_RATIOS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "reranker_prompt_tokens",
            "Tokens of the prompts as the model reads them; against reranker_batch_tokens_sum: what sharing saves.",
            registry=registry,
        )
        # The library finds a label's values anew each time, at several times the cost of counting.
        self._requests = cache(self.requests.labels)
        self._duration, self._stage = cache(self.duration.labels), cache(self.stages.labels)

    # What the batcher reports

    def status_changed(self, status: str) -> None:
        """Count this worker among the ready ones, or not."""
        self.ready.set(status == "ok")

    def loaded(self, info: ModelInfo, memory: int) -> None:
        """Say what is served."""
        self.model.labels(info.name, info.device, info.precision, __version__).set(1)
        self.self_check.set(info.self_check.startswith("failed"))
        self.budget.set(info.max_batch_tokens)
        self.memory.set(memory)

    def queue_changed(self, tokens: int) -> None:
        """Show the queue."""
        self.queue_tokens.set(tokens)

    def request_started(self, wait: float) -> None:
        """Count the wait of every request that comes to the device, whatever becomes of it there."""
        self.queue_wait.observe(wait)

    def pass_ended(self, done: ForwardPass) -> None:
        """Count the batch."""
        self.batch_tokens.observe(done.tokens)
        self.batch_documents.observe(done.documents)
        self.batch_seconds.observe(done.seconds)
        self.utilisation.observe(done.tokens / done.budget)
        self.prompt_tokens.inc(done.prompt_tokens)
        self.budget.set(done.budget)
        self.memory.set(done.memory)

    def cache_used(self, hits: int, misses: int) -> None:
        """Count the documents of a request that were known, and the others."""
        self.cached.labels("hit").inc(hits)
        self.cached.labels("miss").inc(misses)

    def request_scored(self, result: RerankResult) -> None:
        """Count the times of a request."""
        for stage in ("tokenization", "inference", "total"):
            self._stage(stage).observe(getattr(result.timings, stage))
        if result.truncated_documents:
            self.truncated.inc(result.truncated_documents)

    # What the access log and the protocol report

    def request_began(self) -> None:
        """A request is here."""
        self.in_progress.inc()

    def request_ended(self, route: str, status: int, seconds: float, error_type: str | None) -> None:
        """A request is answered. `route` is one of the service's own paths or `OTHER`."""
        self.in_progress.dec()
        self._requests(route, status).inc()
        self._duration(route).observe(seconds)
        if error_type is not None:
            self.errors.labels(error_type).inc()

    def refused(self, status: int, error_type: str) -> None:
        """A connection was refused before there was a request."""
        self.requests.labels(OTHER, str(status)).inc()
        self.errors.labels(error_type).inc()

    # What Prometheus reads

    def render(self, accept: str) -> tuple[bytes, str]:
        """All metrics and their content type, in the format that the Accept header asks for. Reads files: not for
        the event loop.
        """
        encode, kind = choose_encoder(accept)
        if self.folder:
            shared = CollectorRegistry()
            try:
                MultiProcessCollector(shared, self.folder)
                return encode(shared), kind
            except (OSError, ValueError, RuntimeError, struct.error) as error:  # a clean-up of /dev/shm, say
                logger.warning("the folder of shared metrics cannot be read, so /metrics is one worker's: %s", error)
        return encode(self.registry), kind


def _reserve(folder: Path, worker: str) -> bool:
    """Take the space of this worker's files; False where that is not possible.

    The library makes files with holes and writes through a memory map, so a disk that is full later would end the
    process with SIGBUS. A file whose blocks are there already cannot do that. Siblings read every `*.db`, so none is
    there before it is whole.
    """
    made = folder / f"{worker}.new"
    try:
        for name, size in _FILES.items():
            file = folder / f"{name}_{worker}.db"
            place = file if file.exists() else made
            with place.open("ab") as new:
                os.posix_fallocate(new.fileno(), 0, size)
            place.rename(file)
    except OSError as error:
        with suppress(OSError):
            made.unlink()
        logger.warning("no shared metrics, /metrics shows one worker's own: %s", error)
        return False
    return True
