"""The batch loop: forward passes over the queue, one after another, each shared by all pending jobs.

There is no wait window: a batch is all that is pending when the device, or one of the lanes of a CPU, becomes idle.
During a pass, the next batch gathers; once it is full and half of the pass is over, it is packed in another thread. The
event loop never computes.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import islice
from typing import Any

from reranker.errors import DeviceLostError, RerankError, ScoringError
from reranker.scheduler.compute import ComputeThread, ScorerLike, catch_panics
from reranker.scheduler.events import ForwardPass, Observer
from reranker.scheduler.queue import Admission, Batch, Job
from reranker.types import EncodedRequest

logger = logging.getLogger(__name__)


class Passes:
    """Scores jobs in one event loop.

    Args:
        admission: owns the queue, and is told the speed of full passes.
        compute: the thread of the device.
        observer: receives the events of the queue and of the passes.
        on_lost: called with the error when the device is lost.
        request_timeout: seconds of a request, for the limit of the queue that the observer gets.
    """

    def __init__(
        self,
        admission: Admission,
        compute: ComputeThread,
        observer: Observer,
        on_lost: Callable[[Exception], None],
        request_timeout: float,
    ) -> None:
        self._admission, self._queue = admission, admission.queue
        self._compute = compute
        self._observer = observer
        self._on_lost = on_lost
        self._request_timeout = request_timeout
        self._jobs: set[Job] = set()  # unresolved: in the queue, in a batch, or in parts of both
        self._packer = ThreadPoolExecutor(1, thread_name_prefix="packer")  # tokenising must not delay it
        self._changed = asyncio.Event()  # set by a new job and at the end of a pass
        self._lane_idle = False  # since the newest pass started
        self._half_over = math.nan  # when half of the newest pass will be over; NaN if the speed is unknown
        self._over = math.nan  # when all of it will be

    async def score(self, requests: Sequence[EncodedRequest], counted: bool) -> list[Job]:
        """Queue the requests of one client and wait until all are scored.

        An error of one, or a cancellation, drops the pending documents of all.

        Args:
            requests: at least one.
            counted: whether the observer is told how long the first one waited.
        """
        now, loop = time.monotonic(), asyncio.get_running_loop()
        jobs = [Job(request, loop.create_future(), now, counted and not i) for i, request in enumerate(requests)]
        self._jobs.update(jobs)
        for job in jobs:
            self._queue.put(job)
        self._observer.queue_changed(self._queue.tokens)
        self._changed.set()
        try:
            await (jobs[0].done if len(jobs) == 1 else asyncio.gather(*(job.done for job in jobs)))
        except BaseException:
            for job in jobs:
                job.done.cancel()
            self._drop_finished()
            raise
        finally:
            self._jobs.difference_update(jobs)
        return jobs

    def fail_all(self, error: Exception) -> None:
        """Fail every job that is not scored."""
        for job in self._jobs:
            job.fail(error)
        self._drop_finished()

    def close(self) -> None:
        """Start no further work."""
        self._packer.shutdown(wait=False, cancel_futures=True)

    def _drop_finished(self) -> None:
        self._queue.drop_finished()
        self._observer.queue_changed(self._queue.tokens)

    async def run(self, scorer: ScorerLike) -> None:
        """Gather, take, pack, score, forever; at most one batch ahead of the device."""
        running: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        running.set_result(None)
        before = running
        if scorer.lanes is not None:
            scorer.lanes.on_idle = partial(self._wake, asyncio.get_running_loop())
        while True:
            await self._gather(scorer, running, before)
            batch = self._queue.take(scorer.max_batch_tokens, scorer.max_batch_documents)
            self._observer.queue_changed(self._queue.tokens)
            if not batch:
                continue
            packed = None  # without a running pass the compute thread packs, which saves a thread switch
            if not running.done():
                slices, pack = [part for _, part in batch], catch_panics(scorer.pack)
                with suppress(Exception):  # the compute thread will raise it again
                    packed = await asyncio.get_running_loop().run_in_executor(self._packer, pack, slices)
            await (running if scorer.lanes is None else before)
            if all(job.done.done() for job, _ in batch):  # all clients disconnected while it was packed
                continue
            seconds = sum(part.tokens for _, part in batch) / self._admission.tokens_per_second
            start = time.monotonic() if running.done() else max(time.monotonic(), self._over)
            self._half_over, self._over = start + seconds / 2, start + seconds
            self._lane_idle = False  # the pass is not in the lanes yet
            before, running = running, asyncio.create_task(self._score_batch(scorer, batch, packed, running))
            running.add_done_callback(lambda _: self._changed.set())

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Tell the batch loop that a lane is idle; in a thread of the device."""

        def wake() -> None:
            self._lane_idle = True
            self._changed.set()

        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(wake)

    async def _gather(self, scorer: ScorerLike, running: asyncio.Future[None], before: asyncio.Future[None]) -> None:
        """Wait until device or lane is idle and a job pending, or a full batch is and half of the running pass is over.

        Half: a small request that arrives before gets into the next pass, and there is time to pack.
        """

        def idle() -> bool:
            lane = self._lane_idle and scorer.lanes is not None and scorer.lanes.idle
            return running.done() or (before.done() and lane)

        while not (idle() and len(self._queue)):
            if running.done():
                running.result()  # raises the error of the last pass even though no job is pending
            full = self._queue.tokens >= scorer.max_batch_tokens
            remaining = self._half_over - time.monotonic()
            if full and not remaining > 0:  # true also for NaN
                return
            self._changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(remaining if full else None):
                    await self._changed.wait()

    async def _score_batch(
        self, scorer: ScorerLike, batch: Batch, packed: Any, before: asyncio.Future[None] | None = None
    ) -> None:
        """Score a batch. After an error its requests are scored one by one, and only the one that causes it fails.

        If the pass `before` still runs, this one counts from its end: until then it fills the cores that are idle. But
        it counts at least half of its own time, which two passes share at most.
        """
        budget = scorer.max_batch_tokens  # lower after a pass that ran out of memory
        start = begun = time.monotonic()
        timed = True
        score = partial(self._compute.score, scorer, [part for _, part in batch], packed)
        early: asyncio.Task[list[float]] | None = None
        if before is not None and not before.done():
            early = asyncio.create_task(score())
            await asyncio.wait({before})
            if timed := not early.done():
                start = time.monotonic()
        for job, _ in batch:
            if math.isnan(job.started_at):
                job.started_at = start
                if job.counted:
                    self._observer.request_started(start - job.queued_at)
        try:
            logits = await (early or score())
        except DeviceLostError as error:
            self._on_lost(error)
        except Exception as error:  # of any kind: the loop must not end
            logger.exception("a batch of %d request(s) failed", len(batch))
            await self._isolate(scorer, batch, error)
        else:
            rest = iter(logits)
            for job, part in batch:
                job.fill(part, list(islice(rest, part.stop - part.start)))
            end = time.monotonic()
            self._report(scorer, batch, budget, max(end - start, (end - begun) / 2), timed)

    async def _isolate(self, scorer: ScorerLike, batch: Batch, error: Exception) -> None:
        """Fail the only request of a failed batch, or score each unresolved one in its own batch."""
        if len(batch) == 1:
            known = isinstance(error, RerankError)
            batch[0][0].fail(error if known else ScoringError("scoring failed; the operator's log has the cause"))
            return
        for job, part in batch:
            if not job.done.done():
                await self._score_batch(scorer, [(job, part)], None)

    def _report(self, scorer: ScorerLike, batch: Batch, budget: int, seconds: float, timed: bool) -> None:
        """Tell the observer of a pass, and the admission of its speed if it was at least half full and `timed`."""
        documents = sum(part.stop - part.start for _, part in batch)
        tokens = sum(part.tokens for _, part in batch)
        prompt_tokens = sum(part.prompt_tokens for _, part in batch)
        self._observer.pass_ended(ForwardPass(documents, tokens, prompt_tokens, budget, seconds, scorer.memory))
        if timed and (tokens >= budget // 2 or documents >= scorer.max_batch_documents // 2):
            self._admission.observe_speed(tokens, seconds)
            self._observer.queue_limit_changed(self._admission.limit(self._request_timeout))
