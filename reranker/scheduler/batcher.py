"""Many clients in, fair batches out: the asynchronous front of the synchronous Scorer.

rerank()      look up in the score cache -> tokenise in a host thread -> queue, counted in tokens -> wait for logits
rerank_all()  the same for a request with several queries, in runs
Passes.run()  gather -> take up to the token budget -> pack -> score in the compute thread
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence

from reranker.engine.scores import per_document
from reranker.errors import DeadlineError, NotReadyError, ScoringError
from reranker.scheduler.cache import ScoreCache
from reranker.scheduler.compute import ComputeThread, ScorerLike
from reranker.scheduler.events import NullObserver, Observer, Status
from reranker.scheduler.passes import Passes
from reranker.scheduler.queue import Admission, Job, TokenQueue
from reranker.scheduler.runs import in_order, in_turns, split
from reranker.scheduler.tokenizer_pool import TokenizerPool
from reranker.types import DocumentScore, EncodedRequest, RerankRequest, RerankResult, Timings

logger = logging.getLogger(__name__)


class Batcher:
    """Loads one scorer in the background and shares its forward passes between all requests of this process.

    Args:
        load, load_timeout, pass_timeout: see `ComputeThread`.
        max_queue_tokens, max_requests: see `Admission`.
        request_timeout: seconds of a request, for the limit of the queue that the observer gets.
        cache_entries: documents in the score cache; 0: no cache.
        on_failure: called once, with the error, if the scorer cannot be loaded or is lost.
        observer: receives the events.
    """

    def __init__(
        self,
        load: Callable[[], ScorerLike],
        *,
        max_queue_tokens: int = 1_000_000,
        max_requests: int = 1000,
        load_timeout: float = 1800.0,
        pass_timeout: float = 200.0,
        request_timeout: float = 100.0,
        cache_entries: int = 0,
        on_failure: Callable[[Exception], None] = lambda error: None,
        observer: Observer | None = None,
    ) -> None:
        self._observer: Observer = observer or NullObserver()
        self._loaded = asyncio.Event()  # set once the status is no longer "loading"
        self._set_status("loading")
        self.scorer: ScorerLike | None = None
        self.failure: Exception | None = None
        """Why the scorer was not loaded or is lost."""
        self.queue = TokenQueue()
        self.admission = Admission(self.queue, max_queue_tokens, max_requests)
        self._observer.queue_limit_changed(self.admission.limit(request_timeout))
        self._cache = ScoreCache(cache_entries) if cache_entries else None
        self._on_failure = on_failure
        self.on_unhealthy: Callable[[], None] = lambda: None
        """Called before any pending request fails; set by server/worker.py, to stop accepting connections first."""
        self.unhealthy_retry_after = 30  # seconds; server/worker.py lowers it where a sibling serves
        self._tokenizers = TokenizerPool()
        self._compute = ComputeThread(load, load_timeout=load_timeout, pass_timeout=pass_timeout)
        self._passes = Passes(self.admission, self._compute, self._observer, self._give_up, request_timeout)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start loading in the background."""
        self._task = asyncio.create_task(self._load_and_run())

    async def wait_until_loaded(self) -> None:
        """Wait until the scorer is loaded, cannot be loaded, or is not needed any more."""
        await self._loaded.wait()

    def drain(self) -> None:
        """Accept no new requests; finish the accepted ones."""
        if self.status != "unhealthy":
            self._set_status("draining")

    async def stop(self) -> None:
        """Stop the loop; pending requests fail with 503."""
        self._set_status("draining")
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._passes.fail_all(NotReadyError("the service is shutting down; try again", retry_after=5))
        self._tokenizers.close()
        self._passes.close()
        self._compute.close()

    async def _load_and_run(self) -> None:
        start = time.monotonic()
        try:
            self.scorer = await self._compute.load()
        except Exception as error:  # depends on the checkpoint; on_failure reports it
            self._give_up(error)
            return
        self._observer.loaded(self.scorer.info, self.scorer.memory)
        if self.status == "loading":
            self._set_status("ok")
        logger.info("ready after %.1f s: %s", time.monotonic() - start, self.scorer.info.summary)
        try:
            await self._passes.run(self.scorer)
        except Exception:  # a bug: without the loop all requests would hang
            logger.exception("the batch loop failed")
            self._give_up(NotReadyError("the batch loop failed and the worker restarts; try again", retry_after=10))

    def _give_up(self, error: Exception) -> None:
        """Become unhealthy, fail the pending requests, then end the worker through `on_failure`; once."""
        if self.status == "unhealthy":
            return
        self.failure = error
        self._set_status("unhealthy")
        try:
            self.on_unhealthy()
        except Exception:  # the pending requests still need a response
            logger.exception("the worker still accepts connections although its scorer is lost")
        self._passes.fail_all(error)
        self._on_failure(error)

    def _set_status(self, status: Status) -> None:
        self.status: Status = status
        if status != "loading":
            self._loaded.set()
        self._observer.status_changed(status)

    def require_ready(self) -> ScorerLike:
        """Return the scorer; raise NotReadyError while loading, draining or unhealthy."""
        if self.status != "ok" or self.scorer is None:
            wait = self.unhealthy_retry_after if self.status == "unhealthy" else 5
            raise NotReadyError(f"the service is {self.status}; try again in {wait} s", retry_after=wait)
        return self.scorer

    def check_capacity(self, seconds: float) -> ScorerLike:
        """Return the scorer if a new request with `seconds` would be accepted; for the time before its body is read.

        So a full queue also refuses requests that the cache could answer: only their bodies would tell.
        Raises NotReadyError and QueueFullError as `rerank` does.
        """
        scorer = self.require_ready()
        self.admission.check(scorer.max_batch_tokens, seconds)
        return scorer

    async def rerank(self, request: RerankRequest, seconds: float) -> RerankResult:
        """Score a request within `seconds`. Cancelling the call drops its pending documents.

        Raises:
            NotReadyError: loading, draining or unhealthy.
            QueueFullError: too many requests or tokens; the error says when to try again.
            InvalidRequestError: the query leaves no room for a document, or a document that may not be truncated is
                too long.
            DeadlineError: `seconds` are over.
            ScoringError: the model failed on this request.
        """
        return await self.rerank_all([request], seconds)

    async def rerank_all(self, requests: Sequence[RerankRequest], seconds: float) -> RerankResult:
        """Score one client's request that has several queries; it is admitted, timed and cancelled as a whole.

        The result has the documents of all `requests` in the order of their `positions`, which are 0, 1, 2, ...
        Raises the errors of `rerank`.
        """
        start = time.monotonic()
        scorer, timings = self.require_ready(), Timings()
        if self._cache is None:
            parts = await self._score(scorer, requests, seconds, timings)
        else:
            parts = await self._score_uncached(self._cache, scorer, requests, seconds, timings)
        timings.total = time.monotonic() - start
        result = RerankResult.of(in_order(requests, parts), timings)
        self._observer.request_scored(result)
        return result

    async def _score_uncached(
        self, cache: ScoreCache, scorer: ScorerLike, requests: Sequence[RerankRequest], seconds: float, timings: Timings
    ) -> list[list[DocumentScore]]:
        """Do `_score` for the documents that are not in the cache."""
        lookups = list(map(cache.lookup, requests))
        rest = [
            request.only(list(missing.values()))
            for request, (_, _, missing) in zip(requests, lookups, strict=True)
            if missing
        ]
        scored = iter(await self._score(scorer, rest, seconds, timings) if rest else ())
        parts = []
        for keys, known, missing in lookups:
            new = dict(zip(missing, next(scored), strict=True)) if missing else {}
            cache.store(new)
            known |= new
            parts.append([known[key] for key in keys])
            self._observer.cache_used(len(keys) - len(missing), len(missing))
        return parts

    async def _score(
        self, scorer: ScorerLike, requests: Sequence[RerankRequest], seconds: float, timings: Timings
    ) -> list[list[DocumentScore]]:
        """Tokenise, enqueue and wait for the logits, in runs; raises the errors of `rerank`.

        Enters the timings: tokenisation and queue end with those of the first run, inference with the last run.
        """
        info = scorer.info
        tokens = [self.admission.estimate(request, info) for request in requests]
        self.admission.check(scorer.max_batch_tokens, seconds, sum(tokens))
        self.admission.requests += 1
        start, late = time.monotonic(), False
        scores: list[list[DocumentScore]] = [[] for _ in requests]
        first: list[Job] = []

        async def score(run: slice) -> None:
            encoded = await self._encode(scorer, requests[run])
            self.admission.release(reservation, sum(tokens[run]))
            if self.status == "unhealthy":  # while draining, accepted requests are still scored
                self.require_ready()
            jobs = await self._passes.score(encoded, counted=run.start == 0)
            scores[run] = map(_scores, jobs)
            if run.start == 0:
                first.extend(jobs)

        try:
            async with asyncio.timeout(seconds):
                with self.admission.reserve(sum(tokens)) as reservation:
                    await in_turns(split(tokens, scorer.max_batch_tokens // 4), score)
        except TimeoutError:
            late = True  # raised below: as a context this error would keep the request until the next collection
        finally:
            self.admission.requests -= 1
        if late:
            raise DeadlineError(f"not answered within {seconds:g} s; send fewer documents, or raise REQUEST_TIMEOUT")
        queued, started = first[0].queued_at, min(job.started_at for job in first)
        timings.tokenization, timings.queue = queued - start, started - queued
        timings.inference = time.monotonic() - started
        return scores

    async def _encode(self, scorer: ScorerLike, requests: Sequence[RerankRequest]) -> list[EncodedRequest]:
        """Tokenise the requests of a run; the admission learns from their tokens."""
        if len(requests) == 1:  # without a further task
            encoded = [await self._tokenizers.encode(scorer, requests[0])]
        else:
            encoded = await asyncio.gather(*(self._tokenizers.encode(scorer, request) for request in requests))
        info = scorer.info
        for request, part in zip(requests, encoded, strict=True):
            self.admission.observe_tokens(request, part, info)
        return encoded


def _scores(job: Job) -> list[DocumentScore]:
    """Return the scores of a resolved job; raise ScoringError if one is not a number."""
    if not all(map(math.isfinite, job.logits)):
        raise ScoringError("a score is not a number; the operator can set MODEL_PRECISION=float32")
    return per_document(job.request, job.logits)
