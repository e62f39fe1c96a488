"""One simulated worker: the service's own queue and the batcher's rule around a device that takes time.

Only the forward pass is a model; reranker/scheduler/queue.py, the code that serves, decides its content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import simpy

from reranker.scheduler.queue import Job, TokenQueue
from reranker.types import Slice

Batch = list[tuple[Job, Slice]]


@dataclass(frozen=True, slots=True)
class Speed:
    """A forward pass takes `overhead + tokens / rate` seconds; `budget` is warmup.py's choice at this rate."""

    rate: float = 54_000.0
    """Tokens a second: half of a 4B model's rate at an H200's measured matmul rate (benchmarks/capacity.py)."""
    overhead: float = 0.015
    """Seconds of a pass that do not depend on its tokens: about 36 layers of 20 launches."""
    budget: int = 27_000
    """Tokens of a pass: 0.5 s of work."""


class Gpu:
    """One worker: queue, batcher's rule, device."""

    def __init__(self, env: simpy.Environment, speed: Speed, remember: bool = False) -> None:
        self.env = env
        self.speed = speed
        self.queue = TokenQueue()
        self.running: Batch = []
        self.ahead: Batch = []
        self.busy = 0.0
        """Seconds of forward passes begun so far."""
        self.passes = 0
        self.pack_at = 0.0
        """When half of the pass that runs is over."""
        self.most = 0
        """Tokens of the largest pass of more than one document."""
        self.known: set[int] | None = set() if remember else None
        """Queries whose prefix costs nothing any more. The service has no such memory: see `ideal cache` below."""

    def put(self, job: Job) -> None:
        """A request arrives."""
        self.queue.put(job)
        self._next()

    def _next(self, event: simpy.Event | None = None) -> None:
        """Batcher._run: take when the device is free, or one full batch when half of a pass is over."""
        if not self.running and (self.ahead or len(self.queue)):
            self.running, self.ahead = self.ahead or self._take(), []
            seconds = self._seconds(self.running)
            self.busy += seconds
            self.passes += 1
            self.pack_at = self.env.now + seconds / 2
            cast("Any", self.env.timeout(seconds).callbacks).append(self._end)
            cast("Any", self.env.timeout(seconds / 2).callbacks).append(self._next)
        full = self.queue.tokens >= self.speed.budget
        if self.running and not self.ahead and full and self.env.now >= self.pack_at:
            self.ahead = self._take()

    def _take(self) -> Batch:
        return self.queue.take(self.speed.budget, 1 << 30)

    def _seconds(self, batch: Batch) -> float:
        tokens = sum(part.tokens for _, part in batch)
        if sum(part.stop - part.start for _, part in batch) > 1:
            self.most = max(self.most, tokens)
        if self.known is not None:
            for query, size in [(part.request.prefix[0], len(part.request.prefix)) for _, part in batch]:
                tokens -= size if query in self.known else 0
                self.known.add(query)
        return self.speed.overhead + tokens / self.speed.rate

    def _end(self, event: simpy.Event) -> None:
        batch, self.running = self.running, []
        for job, part in batch:
            job.fill(part, [0.0] * (part.stop - part.start))
        self._next()


class Answer:
    """Stands for the future that a request waits for."""

    def __init__(self, resolved: Callable[[], None]) -> None:
        self.resolved = resolved
        self.answered = False

    def done(self) -> bool:
        """Whether every document has its logit."""
        return self.answered

    def set_result(self, result: None) -> None:
        """Called by Job.fill with the last logit."""
        self.answered = True
        self.resolved()
