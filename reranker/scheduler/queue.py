"""The queue between clients and the device: counted in tokens; each batch serves the smallest and the oldest.

Pure bookkeeping for one event loop: no thread, no clock of its own, nothing asynchronous.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass, field

from reranker.engine.budget import fit_documents
from reranker.types import EncodedRequest, Slice


def small(budget: int) -> int:
    """Most tokens of a small request: it fits into half of a forward pass."""
    return budget // 2


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

    @property
    def documents(self) -> int:
        """Documents that still wait."""
        return len(self.request.documents) - self.taken

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
        self._jobs: list[Job] = []
        """Oldest first."""
        self._odd = 0
        """0 and 1 by turns: who gets the odd one of an odd number of documents."""
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
        self._keep(lambda job: not job.done.done())

    def take(self, max_tokens: int, max_documents: int) -> list[tuple[Job, Slice]]:
        """The next batch: whatever waits, up to both limits; empty only when no live job waits.

        Half of it is for small jobs, and where there are none for those with the least left to do: so a small request
        is in the next batch, however many huge ones wait. The rest is for the oldest, so that it is done in time,
        however many small ones come. Jobs are cut between documents. A document of the oldest that is larger than
        what is left goes along all the same.
        """
        self.drop_abandoned()
        if not self._jobs:
            return []
        oldest, *others = self._jobs
        self._odd ^= 1
        half = small(max_tokens)
        tokens = max(half, max_tokens - oldest.tokens)
        documents = max((max_documents + self._odd) // 2, max_documents - oldest.documents)
        batch: list[tuple[Job, Slice]] = []
        for job in sorted(others, key=lambda job: max(half, job.tokens)):  # of equal ones the older first
            stop = fit_documents(job.request, job.taken, tokens, documents)
            if stop == job.taken:
                break
            part = job.take(stop)
            batch.append((job, part))
            tokens, documents = tokens - part.tokens, documents - (stop - part.start)
            max_tokens, max_documents = max_tokens - part.tokens, max_documents - (stop - part.start)
        if max_documents > 0:
            stop = fit_documents(oldest.request, oldest.taken, max_tokens, max_documents)
            batch.append((oldest, oldest.take(max(stop, oldest.taken + 1))))
        self._keep(lambda job: job.documents > 0)
        return batch

    def tokens_up_to(self, most: int) -> int:
        """Tokens of the jobs that have at most so many left."""
        return sum(job.tokens for job in self._jobs if job.tokens <= most)

    def clear(self) -> None:
        """Take everything out."""
        self._jobs, self.tokens = [], 0

    def _keep(self, wanted: Callable[[Job], bool]) -> None:
        self._jobs = list(filter(wanted, self._jobs))
        self.tokens = sum(job.tokens for job in self._jobs)
