"""Many clients in, fair batches out: the asynchronous front of the synchronous Scorer.

    rerank()  encode in a host thread -> queue, counted in tokens -> wait for the logits
    _run()    take what waits, up to the token budget -> pack and score in the compute thread

There is no wait window: a batch is whatever waits when the device is free. While it runs, the next one gathers, and
is packed in a thread of its own when it is full and half of the time is over. The event loop never computes. What
the score cache knows is answered without any of it.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from reranker.engine.scores import per_document
from reranker.errors import DeadlineError, DeviceLostError, NotReadyError, RerankError, ScoringError
from reranker.scheduler.admission import Admission
from reranker.scheduler.compute import ComputeThread, ScorerLike, catch_panics
from reranker.scheduler.events import ForwardPass, Observer
from reranker.scheduler.queue import Job, TokenQueue
from reranker.scheduler.tokenizer_pool import Encoder
from reranker.types import DocumentScore, EncodedRequest, RerankRequest, RerankResult, Slice, Timings

if TYPE_CHECKING:
    from reranker.scheduler.cache import ScoreCache

logger = logging.getLogger(__name__)

Status = Literal["loading", "ok", "draining", "unhealthy"]


class Batcher:
    """Loads one scorer in the background and shares its forward passes between all requests of this process.

    Args:
        load: makes the scorer; runs in the compute thread.
        max_queue_tokens: tokens that may wait; see `Admission`.
        max_requests: requests in progress, those being tokenised included.
        load_timeout: seconds that `load` may take.
        pass_timeout: seconds that a forward pass may take.
        cache_entries: documents whose scores are remembered; 0: none.
        on_failure: called once with the error when the scorer cannot be loaded or its device is lost.
        observer: told what happens.
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
        self._observer = observer or Observer()
        self._left_loading = asyncio.Event()
        self.status = "loading"
        self.scorer: ScorerLike | None = None
        self.max_requests = max_requests
        self.requests = 0
        self.queue = TokenQueue()
        self._jobs: set[Job] = set()
        """Those that are not answered yet: in the queue, in a batch, or in parts of both."""
        self.admission = Admission(max_queue_tokens, self.queue)
        self._cache: ScoreCache | None = None
        if cache_entries:
            from reranker.scheduler.cache import ScoreCache  # and its library, for those who use it

            self._cache = ScoreCache(cache_entries, self._observer)
        self._on_failure = on_failure
        self.on_unhealthy: Callable[[], None] = lambda: None
        """Called before any pending request fails; set by worker.py, which then stops accepting connections."""
        self.unhealthy_retry_after = 30
        """Seconds; worker.py lowers it where a sibling serves."""
        self._encoder = Encoder()
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="packer")  # its own: never behind what is tokenised
        self._compute = ComputeThread(load, load_timeout=load_timeout, pass_timeout=pass_timeout)
        self._changed = asyncio.Event()
        self._pack_at = math.nan
        """When half of the pass that runs will be over; NaN where its speed is not known."""
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> Status:
        """What the service can do now."""
        return self._status

    @status.setter
    def status(self, status: Status) -> None:
        self._status = status
        if status != "loading":
            self._left_loading.set()
        self._observer.status_changed(status)

    async def start(self) -> None:
        """Begin to load; returns at once."""
        self._task = asyncio.create_task(self._load_and_run())

    async def wait_until_loaded(self) -> None:
        """Until the scorer is there, cannot be loaded, or nobody waits for it any more."""
        await self._left_loading.wait()

    async def stop(self) -> None:
        """End the loop; what still waits is answered with 503."""
        self.status = "draining"
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self.queue.clear()
        self._observer.queue_changed(0)
        for job in list(self._jobs):
            job.fail(NotReadyError("the service is shutting down; try again", retry_after=5))
        self._encoder.close()
        self._packer.shutdown(wait=False, cancel_futures=True)
        self._compute.close()

    def drain(self) -> None:
        """Take nothing new; what was accepted is still answered."""
        if self.status != "unhealthy":
            self.status = "draining"

    def require_ready(self) -> ScorerLike:
        """The scorer, or the reason why there is none.

        Raises:
            NotReadyError: loading, draining or unhealthy.
        """
        if self.status != "ok" or self.scorer is None:
            wait = {"loading": 5, "draining": 5, "unhealthy": self.unhealthy_retry_after, "ok": 5}[self.status]
            raise NotReadyError(f"the service is {self.status}; try again in {wait} s", retry_after=wait)
        return self.scorer

    def check_capacity(self, seconds: float) -> None:
        """Would a request that is given so many seconds be taken; asked before its body is read.

        So a full queue refuses what the cache knows as well: to find that out, the body would have to be read.

        Raises:
            NotReadyError: loading, draining or unhealthy.
            QueueFullError: too much is in progress or waits already; says when to come back.
        """
        scorer = self.require_ready()
        if self.requests >= self.max_requests:
            raise self.admission.refusal(f"{self.requests} requests are in progress")
        self.admission.check(scorer.max_batch_tokens, seconds)

    async def rerank(self, request: RerankRequest, seconds: float) -> RerankResult:
        """Score a request within `seconds`. Cancelling the call drops what still waits of it.

        Raises:
            NotReadyError: loading, draining or unhealthy.
            QueueFullError: too much waits already; says when to come back.
            InvalidRequestError: the query leaves no room for a document, or a document may not be cut and must be.
            DeadlineError: not answered in time.
            ScoringError: the model failed on this request.
        """
        start = time.monotonic()
        timings = Timings()
        score = partial(self._through_queue, self.require_ready(), seconds, timings)
        scores = await (score(request) if self._cache is None else self._cache.scores(request, score))
        timings.total = time.monotonic() - start
        result = RerankResult.of(scores, timings)
        self._observer.request_scored(result)
        return result

    async def _through_queue(
        self, scorer: ScorerLike, seconds: float, timings: Timings, request: RerankRequest
    ) -> list[DocumentScore]:
        """Tokenise, wait for the device and be scored; enters its times. Raises what `rerank` does."""
        self.check_capacity(seconds)
        self.requests += 1
        start = time.monotonic()
        late = False
        try:
            async with asyncio.timeout(seconds):
                with self.admission.encoding(request, scorer.info, seconds):
                    encoded = await self._encoder.encode(scorer, request)
                self.admission.encoded(request, encoded)
                timings.tokenization = time.monotonic() - start
                job = self._enqueue(encoded)
                try:
                    await job.done
                except asyncio.CancelledError:
                    job.done.cancel()
                    self.queue.drop_abandoned()
                    self._observer.queue_changed(self.queue.tokens)
                    raise
                finally:
                    self._jobs.discard(job)
        except TimeoutError:
            late = True  # raised below: with this error as its context it would keep the request until the next walk
        finally:
            self.requests -= 1
        if late:
            raise DeadlineError(
                f"not answered within {seconds:g} s; send fewer documents at a time, or raise REQUEST_TIMEOUT"
            )
        if not all(map(math.isfinite, job.logits)):
            raise ScoringError(
                "the model gave a score that is not a number; the operator can set MODEL_PRECISION=float32"
            )
        timings.queue, timings.inference = job.started_at - job.queued_at, time.monotonic() - job.started_at
        return per_document(encoded, job.logits)

    def _enqueue(self, request: EncodedRequest) -> Job:
        if self.status == "unhealthy":  # draining is for what comes later: this one was accepted
            self.require_ready()
        job = Job(request, asyncio.get_running_loop().create_future(), queued_at=time.monotonic())
        self._jobs.add(job)
        self.queue.put(job)
        self._observer.queue_changed(self.queue.tokens)
        self._changed.set()
        return job

    async def _load_and_run(self) -> None:
        start = time.monotonic()
        try:
            self.scorer = await self._compute.load()
        except Exception as error:  # whatever a checkpoint can break: said once, then the process ends
            self._give_up(error)
            return
        self._observer.loaded(self.scorer.info, self.scorer.memory)
        if self.status == "loading":
            self.status = "ok"
        logger.info("ready after %.1f s: %s", time.monotonic() - start, self.scorer.info)
        try:
            await self._run(self.scorer)
        except Exception:  # a bug: without the loop nobody would be answered, so end rather than hang
            logger.exception("the batch loop failed")
            self._give_up(NotReadyError("the batch loop failed and the worker restarts; try again", retry_after=10))

    async def _run(self, scorer: ScorerLike) -> None:
        """The whole algorithm: gather, take, pack, score; one batch ahead of the device."""
        running: asyncio.Task[None] | None = None
        while True:
            await self._gather(scorer, running)
            batch = self.queue.take(scorer.max_batch_tokens, scorer.max_batch_documents)
            self._observer.queue_changed(self.queue.tokens)
            if not batch:
                continue
            # Beside a pass that runs; where none does, the compute thread packs: a trip less.
            ahead = running is not None and not running.done()
            packed = await self._pack(scorer, batch) if ahead else None
            if running is not None:
                await running
            if all(job.done.done() for job, _ in batch):  # everybody left while it was packed ahead
                continue
            tokens = sum(part.tokens for _, part in batch)
            self._pack_at = time.monotonic() + tokens / self.admission.tokens_per_second / 2
            running = asyncio.create_task(self._score(scorer, batch, packed))
            running.add_done_callback(lambda _: self._changed.set())

    async def _gather(self, scorer: ScorerLike, running: asyncio.Task[None] | None) -> None:
        """Until the device is free and something waits, or a full batch waits and the pass that runs is half over.

        Half: a small request that comes before gets into the next pass, and there is time to pack.
        """
        while not (len(self.queue) and (running is None or running.done())):
            if running is not None and running.done():
                running.result()  # raises what it raised, though nobody waits for the device
            full = self.queue.tokens >= scorer.max_batch_tokens
            left = self._pack_at - time.monotonic()
            if full and not left > 0:
                return
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(left if full else None):
                    await self._changed.wait()

    async def _pack(self, scorer: ScorerLike, batch: list[tuple[Job, Slice]]) -> Any:
        try:
            slices = [part for _, part in batch]
            return await asyncio.get_running_loop().run_in_executor(self._packer, catch_panics(scorer.pack), slices)
        except Exception as error:  # dealt with in _score, request by request
            return error

    async def _score(self, scorer: ScorerLike, batch: list[tuple[Job, Slice]], packed: Any) -> None:
        """Score one batch. An exception fails only its batch, and in it only the request that causes it."""
        start = time.monotonic()
        budget = scorer.max_batch_tokens  # lower behind a pass that ran out of memory
        for job, _ in batch:
            if math.isnan(job.started_at):
                job.started_at = start
                self._observer.request_started(start - job.queued_at)
        try:
            if isinstance(packed, Exception):
                raise packed
            logits = await self._compute.score(scorer, [part for _, part in batch], packed)
        except DeviceLostError as error:
            self._give_up(error)
            return
        except Exception as error:  # the scorer's, whatever it is: must not end the loop
            logger.exception("a batch of %d request(s) failed", len(batch))
            if len(batch) == 1:
                known = isinstance(error, RerankError)
                batch[0][0].fail(
                    error if known else ScoringError("scoring failed; the operator finds the cause in the log")
                )
                return
            for item in (item for item in batch if not item[0].done.done()):
                await self._score(scorer, [item], None)
            return
        offset = 0
        for job, part in batch:
            count = part.stop - part.start
            job.fill(part, logits[offset : offset + count])
            offset += count
        seconds = time.monotonic() - start
        tokens = sum(part.tokens for _, part in batch)
        prompt_tokens = sum(part.prompt_tokens for _, part in batch)
        self._observer.pass_ended(ForwardPass(offset, tokens, prompt_tokens, budget, seconds, scorer.memory))
        if tokens >= budget // 2 or offset >= scorer.max_batch_documents // 2:
            self.admission.scored(tokens, seconds)

    def _give_up(self, error: Exception) -> None:
        """No scorer, or none any more: whoever waits is told at once, and the process ends."""
        first, self.status = self.status != "unhealthy", "unhealthy"
        if first:
            try:
                self.on_unhealthy()
            except Exception:  # must not leave the pending requests without a response
                logger.exception("the worker still accepts connections although its scorer is lost")
        self.queue.clear()
        self._observer.queue_changed(0)
        for job in list(self._jobs):
            job.fail(error)
        if first:
            self._on_failure(error)
