"""The queue between clients and the device: counted in tokens, first come first served, huge requests by turns.

Pure bookkeeping for one event loop: no thread, no clock of its own, nothing asynchronous.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import dataclass, field

from reranker.engine.budget import fit
from reranker.types import EncodedRequest, Slice


@dataclass(eq=False, slots=True)
class Job:
    """A request on its way through the batches."""

    request: EncodedRequest
    done: asyncio.Future[None]
    """Resolved when every document has its logit, or with the error; cancelled when nobody waits for it any more."""
    queued_at: float
    started_at: float = math.nan
    """When its first document went to the device."""
    logits: list[float] = field(init=False)
    """One per document; NaN until it is scored."""
    taken: int = field(init=False, default=0)
    """Documents handed to batches so far."""
    scored: int = field(init=False, default=0)
    tokens: int = field(init=False)
    """Tokens that still wait."""

    def __post_init__(self) -> None:
        self.logits = [math.nan] * len(self.request.documents)
        self.tokens = self.request.tokens

    def take(self, stop: int) -> Slice:
        """The documents from where the last slice stopped."""
        part = Slice(self.request, self.taken, stop)
        self.taken = stop
        self.tokens -= sum(map(len, part.documents))
        return part

    def fill(self, part: Slice, logits: list[float]) -> None:
        """Enter the logits of a slice; the last one resolves the job."""
        self.logits[part.start : part.stop] = logits
        self.scored += len(logits)
        if self.scored == len(self.logits) and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Resolve the job with an error; what still waits of it is dropped."""
        if not self.done.done():
            self.done.set_exception(error)


class TokenQueue:
    """Jobs that wait, and how many tokens they hold."""

    def __init__(self) -> None:
        self._jobs: deque[Job] = deque()
        self.tokens = 0
        """Tokens of all waiting jobs, abandoned ones included until the next `take` or `drop_abandoned`."""

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Append a job."""
        self._jobs.append(job)
        self.tokens += job.tokens

    def drop_abandoned(self) -> None:
        """Forget the jobs that nobody waits for any more."""
        self._jobs = deque(job for job in self._jobs if not job.done.done())
        self.tokens = sum(job.tokens for job in self._jobs)

    def take(self, max_tokens: int, max_documents: int) -> list[tuple[Job, Slice]]:
        """The next batch: whatever waits, in order, up to both limits; empty only when no live job waits.

        A job above the limits is cut between documents and its remainder goes behind the others, so a small request
        overtakes a huge one. A single document above `max_tokens` makes a batch of its own.
        """
        batch: list[tuple[Job, Slice]] = []
        while self._jobs and max_documents > 0:
            job = self._jobs[0]
            stop = fit(job.request, job.taken, max_tokens, max_documents)
            abandoned = job.done.done()
            if stop == job.taken and batch and not abandoned:
                break
            self._jobs.popleft()
            self.tokens -= job.tokens
            if abandoned:
                continue
            part = job.take(max(stop, job.taken + 1))
            batch.append((job, part))
            if part.stop < len(job.request.documents):
                self.put(job)
                break
            max_tokens -= part.tokens
            max_documents -= part.stop - part.start
        return batch

    def clear(self) -> list[Job]:
        """Take everything out."""
        jobs, self._jobs, self.tokens = list(self._jobs), deque(), 0
        return jobs
