"""The queue between clients and the device: counted in tokens; each batch serves the smallest and the oldest.

Pure bookkeeping for one event loop: no thread, no clock, no coroutine.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

from reranker.engine.budget import fit_documents
from reranker.types import EncodedRequest, Slice


def max_small_tokens(max_batch_tokens: int) -> int:
    """Max tokens of a small request: half of a forward pass."""
    return max_batch_tokens // 2


@dataclass(eq=False, slots=True)
class Job:
    """A tokenised request, scored by one or more batches."""

    request: EncodedRequest
    done: asyncio.Future[None]
    """Resolved with the last logit, or with the error; cancelled when the client gives up."""
    queued_at: float
    started_at: float = math.nan
    """When its first document went to the device."""
    logits: list[float] = field(init=False)
    """One per document; NaN until it is scored."""
    pending_from: int = field(init=False, default=0)
    """Index of the first document that no batch has yet."""
    scored_documents: int = field(init=False, default=0)
    pending_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.logits = [math.nan] * len(self.request.documents)
        self.pending_tokens = self.request.tokens

    @property
    def pending_documents(self) -> int:
        """Documents that no batch has yet."""
        return len(self.request.documents) - self.pending_from

    def take(self, stop: int) -> Slice:
        """Remove the documents from the first pending one up to `stop`."""
        part = Slice(self.request, self.pending_from, stop)
        self.pending_from = stop
        self.pending_tokens -= sum(map(len, part.documents))
        return part

    def fill(self, part: Slice, logits: list[float]) -> None:
        """Enter the logits of a slice; the last one resolves the job."""
        self.logits[part.start : part.stop] = logits
        self.scored_documents += len(logits)
        if self.scored_documents == len(self.logits) and not self.done.done():
            self.done.set_result(None)

    def fail(self, error: Exception) -> None:
        """Resolve the job with an error; the queue drops its pending documents."""
        if not self.done.done():
            self.done.set_exception(error)


Batch = list[tuple[Job, Slice]]


class TokenQueue:
    """Jobs with pending documents."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        """Oldest first."""
        self._odd = 0
        """Alternates between 0 and 1: which half of a batch gets the odd document."""
        self.tokens = 0
        """Pending tokens of all jobs; those of a resolved job count until the next `take` or `drop_finished`."""

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job) -> None:
        """Append a job."""
        self._jobs.append(job)
        self.tokens += job.pending_tokens

    def drop_finished(self) -> None:
        """Drop the jobs that failed, whose client gave up, or without pending documents."""
        self._jobs = [job for job in self._jobs if job.pending_documents and not job.done.done()]
        self.tokens = sum(job.pending_tokens for job in self._jobs)

    def take(self, max_tokens: int, max_documents: int) -> Batch:
        """Remove the next batch: pending documents up to both limits; empty if no unresolved job is pending.

        Half of it is for small jobs, or without any for those with the fewest pending tokens, so that a small request
        is in the next batch however many huge ones are pending. The rest is for the oldest job, so that it ends in time
        however many small ones arrive. Jobs are split between documents. The oldest job may exceed the limit by one
        document.
        """
        self.drop_finished()
        if not self._jobs:
            return []
        oldest, *others = self._jobs
        self._odd ^= 1
        half = max_small_tokens(max_tokens)
        tokens = max(half, max_tokens - oldest.pending_tokens)
        documents = max((max_documents + self._odd) // 2, max_documents - oldest.pending_documents)
        oldest_tokens, oldest_documents = max_tokens - tokens, max_documents - documents
        batch: Batch = []
        for job in sorted(others, key=lambda job: max(half, job.pending_tokens)):  # stable: of equal ones the older
            stop = fit_documents(job.request, job.pending_from, tokens, documents)
            if stop == job.pending_from:
                break
            part = job.take(stop)
            batch.append((job, part))
            tokens, documents = tokens - part.tokens, documents - (stop - part.start)
        if documents + oldest_documents > 0:
            stop = fit_documents(
                oldest.request, oldest.pending_from, tokens + oldest_tokens, documents + oldest_documents
            )
            batch.append((oldest, oldest.take(max(stop, oldest.pending_from + 1))))
        self.drop_finished()
        return batch

    def tokens_up_to(self, max_tokens: int) -> int:
        """Pending tokens of the jobs that have at most `max_tokens`."""
        return sum(job.pending_tokens for job in self._jobs if job.pending_tokens <= max_tokens)

    def clear(self) -> None:
        """Drop all jobs."""
        self._jobs, self.tokens = [], 0
