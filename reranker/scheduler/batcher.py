"""Many clients in, fair batches out: the asynchronous front of the synchronous Scorer.

    rerank()      look up in the score cache -> tokenise in a host thread -> queue, counted in tokens -> wait for logits
    rerank_all()  the same for a request with several queries, in runs
    _run()        gather -> take up to the token budget -> pack -> score in the compute thread

There is no wait window: a batch is all that is pending when the device becomes idle. During a pass, the next batch
gathers; once it is full and half of the pass is over, it is packed in another thread. The event loop never computes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from typing import Any

from reranker.engine.scores import per_document
from reranker.errors import DeadlineError, DeviceLostError, NotReadyError, RerankError, ScoringError
from reranker.scheduler.cache import ScoreCache
from reranker.scheduler.compute import ComputeThread, ScorerLike, catch_panics
from reranker.scheduler.events import ForwardPass, NullObserver, Observer, Status
from reranker.scheduler.queue import Admission, Batch, Job, TokenQueue
from reranker.scheduler.runs import in_turns, split
from reranker.scheduler.tokenizer_pool import TokenizerPool
from reranker.types import DocumentScore, EncodedRequest, RerankRequest, RerankResult, Timings

logger = logging.getLogger(__name__)


class Batcher:
    """Loads one scorer in the background and shares its forward passes between all requests of this process.

    Args:
        load, load_timeout, pass_timeout: see `ComputeThread`.
        max_queue_tokens, max_requests: see `Admission`.
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
        self._cache = ScoreCache(cache_entries) if cache_entries else None
        self._jobs: set[Job] = set()  # unresolved: in the queue, in a batch, or in parts of both
        self._on_failure = on_failure
        self.on_unhealthy: Callable[[], None] = lambda: None
        """Called before any pending request fails; set by server/worker.py, to stop accepting connections first."""
        self.unhealthy_retry_after = 30  # seconds; server/worker.py lowers it where a sibling serves
        self._tokenizers = TokenizerPool()
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="packer")  # tokenising must not delay it
        self._compute = ComputeThread(load, load_timeout=load_timeout, pass_timeout=pass_timeout)
        self._changed = asyncio.Event()  # set by a new job and at the end of a pass
        self._half_over = math.nan  # when half of the running pass will be over; NaN if the speed is unknown
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
        self._fail_all(NotReadyError("the service is shutting down; try again", retry_after=5))
        self._tokenizers.close()
        self._packer.shutdown(wait=False, cancel_futures=True)
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
        logger.info("ready after %.1f s: %s", time.monotonic() - start, self.scorer.info)
        try:
            await self._run(self.scorer)
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
        self._fail_all(error)
        self._on_failure(error)

    def _set_status(self, status: Status) -> None:
        self.status: Status = status
        if status != "loading":
            self._loaded.set()
        self._observer.status_changed(status)

    def _fail_all(self, error: Exception) -> None:
        for job in self._jobs:
            job.fail(error)
        self.queue.drop_finished()
        self._observer.queue_changed(self.queue.tokens)

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
        start = time.monotonic()
        scorer, timings = self.require_ready(), Timings()
        if self._cache is None:
            scores = await self._score(scorer, request, seconds, timings)
        else:
            keys, known, missing = self._cache.lookup(request)
            if missing:
                rest = request.only(list(missing.values()))
                new = dict(zip(missing, await self._score(scorer, rest, seconds, timings), strict=True))
                self._cache.store(new)
                known |= new
            scores = [known[key] for key in keys]
            self._observer.cache_used(len(keys) - len(missing), len(missing))
        timings.total = time.monotonic() - start
        result = RerankResult.of(scores, timings)
        self._observer.request_scored(result)
        return result

    async def _score(
        self, scorer: ScorerLike, request: RerankRequest, seconds: float, timings: Timings
    ) -> list[DocumentScore]:
        """Tokenise, enqueue and wait for the logits; enters the timings. Raises the errors of `rerank`."""
        tokens = self.admission.estimate(request, scorer.info)
        self.admission.check(scorer.max_batch_tokens, seconds, tokens)
        self.admission.requests += 1
        start, late = time.monotonic(), False
        try:
            async with asyncio.timeout(seconds):
                with self.admission.reserve(tokens):
                    encoded = await self._tokenizers.encode(scorer, request)
                self.admission.observe_tokens(request, encoded, scorer.info)
                timings.tokenization = time.monotonic() - start
                job = await self._enqueue(encoded)
        except TimeoutError:
            late = True  # raised below: as a context this error would keep the request until the next collection
        finally:
            self.admission.requests -= 1
        if late:
            raise _too_late(seconds)
        timings.queue, timings.inference = job.started_at - job.queued_at, time.monotonic() - job.started_at
        return _scores(job)

    async def rerank_all(self, requests: Sequence[RerankRequest], seconds: float) -> RerankResult:
        """Score one client's request that has several queries; it is admitted, timed and cancelled as a whole.

        The result has the documents of all `requests` in the order of their `positions`, which are 0, 1, 2, ...
        Raises the errors of `rerank`.
        """
        start = time.monotonic()
        scorer, timings = self.require_ready(), Timings()
        if self._cache is None:
            parts = await self._score_all(scorer, requests, seconds, timings)
        else:
            lookups = list(map(self._cache.lookup, requests))
            rest = [
                request.only(list(missing.values()))
                for request, (_, _, missing) in zip(requests, lookups, strict=True)
                if missing
            ]
            scored = iter(await self._score_all(scorer, rest, seconds, timings) if rest else ())
            parts = []
            for keys, known, missing in lookups:
                new = dict(zip(missing, next(scored), strict=True)) if missing else {}
                self._cache.store(new)
                parts.append([(known | new)[key] for key in keys])
                self._observer.cache_used(len(keys) - len(missing), len(missing))
        timings.total = time.monotonic() - start
        scores = {
            request.position(i): score
            for request, part in zip(requests, parts, strict=True)
            for i, score in enumerate(part)
        }
        result = RerankResult.of([scores[i] for i in range(len(scores))], timings)
        self._observer.request_scored(result)
        return result

    async def _score_all(
        self, scorer: ScorerLike, requests: Sequence[RerankRequest], seconds: float, timings: Timings
    ) -> list[list[DocumentScore]]:
        """Do `_score` for several queries, in runs. The stages in `timings` end with the first run, inference with all.

        Raises the errors of `rerank`.
        """
        tokens = [self.admission.estimate(request, scorer.info) for request in requests]
        self.admission.check(scorer.max_batch_tokens, seconds, sum(tokens))
        self.admission.requests += 1
        start, late = time.monotonic(), False
        scores: list[list[DocumentScore]] = [[] for _ in requests]
        jobs: list[Job] = []  # of the first run

        async def score(run: slice) -> None:
            encoded = await asyncio.gather(*(self._tokenizers.encode(scorer, request) for request in requests[run]))
            for request, part in zip(requests[run], encoded, strict=True):
                self.admission.observe_tokens(request, part, scorer.info)
            reservation.tokens -= sum(tokens[run])
            new = await self._enqueue_all(encoded)
            scores[run] = map(_scores, new)
            jobs.extend(() if jobs else new)

        try:
            async with asyncio.timeout(seconds):
                with self.admission.reserve(sum(tokens)) as reservation:
                    await in_turns(split(tokens, scorer.max_batch_tokens // 4), score)
        except TimeoutError:
            late = True  # as in `_score`
        finally:
            self.admission.requests -= 1
        if late:
            raise _too_late(seconds)
        queued, started = jobs[0].queued_at, min(job.started_at for job in jobs)
        timings.tokenization, timings.queue = queued - start, started - queued
        timings.inference = time.monotonic() - started
        return scores

    async def _enqueue_all(self, requests: Sequence[EncodedRequest]) -> list[Job]:
        """Do `_enqueue` for several queries of one client; an error of one drops the others."""
        if self.status == "unhealthy":
            self.require_ready()
        now, loop = time.monotonic(), asyncio.get_running_loop()
        jobs = [Job(request, loop.create_future(), queued_at=now) for request in requests]
        self._jobs.update(jobs)
        for job in jobs:
            self.queue.put(job)
        self._observer.queue_changed(self.queue.tokens)
        self._changed.set()
        try:
            await asyncio.gather(*(job.done for job in jobs))
        except BaseException:
            for job in jobs:
                job.done.cancel()
            self.queue.drop_finished()
            self._observer.queue_changed(self.queue.tokens)
            raise
        finally:
            self._jobs.difference_update(jobs)
        return jobs

    async def _enqueue(self, request: EncodedRequest) -> Job:
        """Queue a request and wait until it is scored; a cancellation drops its pending documents."""
        if self.status == "unhealthy":  # while draining, accepted requests are still scored
            self.require_ready()
        job = Job(request, asyncio.get_running_loop().create_future(), queued_at=time.monotonic())
        self._jobs.add(job)
        self.queue.put(job)
        self._observer.queue_changed(self.queue.tokens)
        self._changed.set()
        try:
            await job.done
        except asyncio.CancelledError:
            self.queue.drop_finished()
            self._observer.queue_changed(self.queue.tokens)
            raise
        finally:
            self._jobs.discard(job)
        return job

    async def _run(self, scorer: ScorerLike) -> None:
        """Gather, take, pack, score, forever; at most one batch ahead of the device."""
        running: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        running.set_result(None)
        while True:
            await self._gather(scorer, running)
            batch = self.queue.take(scorer.max_batch_tokens, scorer.max_batch_documents)
            self._observer.queue_changed(self.queue.tokens)
            if not batch:
                continue
            packed = None  # without a running pass the compute thread packs, which saves a thread switch
            if not running.done():
                slices, pack = [part for _, part in batch], catch_panics(scorer.pack)
                with suppress(Exception):  # the compute thread will raise it again
                    packed = await asyncio.get_running_loop().run_in_executor(self._packer, pack, slices)
            await running
            if all(job.done.done() for job, _ in batch):  # all clients disconnected while it was packed
                continue
            tokens = sum(part.tokens for _, part in batch)
            self._half_over = time.monotonic() + tokens / self.admission.tokens_per_second / 2
            running = asyncio.create_task(self._score_batch(scorer, batch, packed))
            running.add_done_callback(lambda _: self._changed.set())

    async def _gather(self, scorer: ScorerLike, running: asyncio.Future[None]) -> None:
        """Wait until the device is idle and a job is pending, or a full batch is and half of the running pass is over.

        Half: a small request that arrives before gets into the next pass, and there is time to pack.
        """
        while not (running.done() and len(self.queue)):
            if running.done():
                running.result()  # raises the error of the last pass even though no job is pending
            full = self.queue.tokens >= scorer.max_batch_tokens
            remaining = self._half_over - time.monotonic()
            if full and not remaining > 0:  # true also for NaN
                return
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(remaining if full else None):
                    await self._changed.wait()

    async def _score_batch(self, scorer: ScorerLike, batch: Batch, packed: Any) -> None:
        """Score a batch. After an error its requests are scored one by one, and only the one that causes it fails."""
        start = time.monotonic()
        budget = scorer.max_batch_tokens  # lower after a pass that ran out of memory
        for job, _ in batch:
            if math.isnan(job.started_at):
                job.started_at = start
                self._observer.request_started(start - job.queued_at)
        try:
            logits = await self._compute.score(scorer, [part for _, part in batch], packed)
        except DeviceLostError as error:
            self._give_up(error)
        except Exception as error:  # of any kind: the loop must not end
            logger.exception("a batch of %d request(s) failed", len(batch))
            await self._isolate(scorer, batch, error)
        else:
            rest = iter(logits)
            for job, part in batch:
                job.fill(part, list(islice(rest, part.stop - part.start)))
            self._report(scorer, batch, budget, time.monotonic() - start)

    async def _isolate(self, scorer: ScorerLike, batch: Batch, error: Exception) -> None:
        """Fail the only request of a failed batch, or score each unresolved one in its own batch."""
        if len(batch) == 1:
            known = isinstance(error, RerankError)
            batch[0][0].fail(error if known else ScoringError("scoring failed; the operator's log has the cause"))
            return
        for job, part in batch:
            if not job.done.done():
                await self._score_batch(scorer, [(job, part)], None)

    def _report(self, scorer: ScorerLike, batch: Batch, budget: int, seconds: float) -> None:
        """Tell the observer of a pass, and the admission of its speed if it was at least half full."""
        documents = sum(part.stop - part.start for _, part in batch)
        tokens = sum(part.tokens for _, part in batch)
        prompt_tokens = sum(part.prompt_tokens for _, part in batch)
        self._observer.pass_ended(ForwardPass(documents, tokens, prompt_tokens, budget, seconds, scorer.memory))
        if tokens >= budget // 2 or documents >= scorer.max_batch_documents // 2:
            self.admission.observe_speed(tokens, seconds)


def _scores(job: Job) -> list[DocumentScore]:
    """Return the scores of a resolved job; raise ScoringError if one is not a number."""
    if not all(map(math.isfinite, job.logits)):
        raise ScoringError("a score is not a number; the operator can set MODEL_PRECISION=float32")
    return per_document(job.request, job.logits)


def _too_late(seconds: float) -> DeadlineError:
    return DeadlineError(f"not answered within {seconds:g} s; send fewer documents, or raise REQUEST_TIMEOUT")
