"""The queue between clients and the device, counted in tokens, and the admission to it.

Each batch serves the smallest requests and the oldest one. Pure bookkeeping for one event loop: no thread, no clock, no
coroutine.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import repeat

from reranker.engine.budget import fit_documents
from reranker.errors import QueueFullError
from reranker.types import MAX_CHUNKS, EncodedRequest, ModelInfo, RerankRequest, Slice

# Half of the speed, less a margin for the passes in flight.
_SHARE_OF_TIME = 0.4
# Initial value, typical of English; Chinese has twice as many.
_TOKENS_PER_CHARACTER = 0.3
# The prompt's own text, in characters, per request and per document. Without it, requests of short texts, which are
# mostly prompt, would raise the estimate for long texts tenfold.
_PROMPT_CHARACTERS, _SUFFIX_CHARACTERS = 300, 40
# Weight of the previous value in each moving average.
_MEMORY = 0.8


@dataclass(eq=False, slots=True)
class Job:
    """A tokenised request, scored by one or more batches."""

    request: EncodedRequest
    done: asyncio.Future[None]
    """Resolved with the last logit, or with the error; cancelled when the client gives up."""
    queued_at: float
    counted: bool = True
    """Whether its wait counts as that of its client's request; false for all but the first query of one."""
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


@dataclass(eq=False, slots=True)
class Reservation:
    """Estimated tokens of a request that are not in the queue yet."""

    tokens: int


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
        half = max_tokens // 2
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


class Admission:
    """Accepts or refuses a request by its size in characters, before it is tokenised.

    A request is accepted if it and the pending ones are at most `max_queue_tokens`, and at most the work that the
    measured speed allows within its time. Half of every pass is for the oldest request and half for small ones, so half
    of the speed is guaranteed to each. Small requests are counted among themselves: huge ones cannot exclude them.

    Args:
        queue: the pending requests.
        max_queue_tokens: limit of pending tokens. A larger request is accepted while nothing is pending.
        max_requests: limit of requests in progress, those being tokenised included.
    """

    def __init__(self, queue: TokenQueue, max_queue_tokens: int, max_requests: int) -> None:
        self.queue = queue
        self.max_queue_tokens = max_queue_tokens
        self.max_requests = max_requests
        self.requests = 0
        """In progress: accepted and without a response."""
        self._reserved: set[Reservation] = set()
        """One for each request that is being tokenised."""
        self._tokens, self._characters = _TOKENS_PER_CHARACTER, 1.0
        self.tokens_per_second = math.nan
        """Of full passes; NaN before the first one."""

    def check(self, max_batch_tokens: int, seconds: float, tokens: int = 1) -> None:
        """Raise QueueFullError, with the time of the next try, if `tokens` cannot be scored within `seconds`."""
        if self.requests >= self.max_requests:
            raise self._refusal(f"{self.requests} requests are in progress")
        limit, pending = self.limit(seconds), self._pending
        small = max_batch_tokens // 2  # the half of `TokenQueue.take`
        if tokens <= small and pending + tokens > limit:
            pending = self.queue.tokens_up_to(small) + sum(r.tokens for r in self._reserved if r.tokens <= small)
        if pending and pending + tokens > limit:
            raise self._refusal(f"about {pending} tokens are pending")

    def limit(self, seconds: float) -> float:
        """Return how many tokens may be pending: what can be scored within `seconds`, at most `max_queue_tokens`."""
        if math.isnan(self.tokens_per_second):
            return float(self.max_queue_tokens)
        return min(float(self.max_queue_tokens), self.tokens_per_second * seconds * _SHARE_OF_TIME)

    @contextmanager
    def reserve(self, tokens: int) -> Iterator[Reservation]:
        """Count `tokens` as pending until they are released, at the latest at the end of the block."""
        reservation = Reservation(tokens)
        self._reserved.add(reservation)
        try:
            yield reservation
        finally:
            self._reserved.discard(reservation)

    def release(self, reservation: Reservation, tokens: int) -> None:
        """Count `tokens` of a reservation no more: their part of the request is tokenised."""
        reservation.tokens -= tokens
        if reservation.tokens <= 0:
            self._reserved.discard(reservation)

    def estimate(self, request: RerankRequest, info: ModelInfo) -> int:
        """Estimate the tokens of a request; texts count up to the length that the model reads."""
        rate = self._tokens / self._characters
        chunks = min(request.max_chunks_per_doc or 1, MAX_CHUNKS)
        max_document = max(0, int(info.max_seq_length * chunks / rate) - _SUFFIX_CHARACTERS)
        documents = sum(map(min, map(len, request.documents), repeat(max_document)))
        query = min(len(request.query), int(info.max_seq_length / rate)) * _queries(request, info)
        return int(rate * (_prompt_characters(request) + query + documents)) + 1

    def observe_tokens(self, request: RerankRequest, encoded: EncodedRequest, info: ModelInfo) -> None:
        """Update tokens per character, weighted by the request's size; skip a request with truncated texts."""
        if encoded.truncated or encoded.query_truncated:
            return
        # The cached part of the prefix counts: _PROMPT_CHARACTERS has its characters.
        self._tokens = self._tokens * _MEMORY + encoded.tokens + encoded.cached_prefix_len
        repeated = len(request.query) * (_queries(request, info) - 1)
        characters = _prompt_characters(request) + request.characters + repeated
        self._characters = self._characters * _MEMORY + characters

    def observe_speed(self, tokens: int, seconds: float) -> None:
        """Update the speed from a pass that was at least half full."""
        rate = tokens / max(seconds, 1e-6)
        known = self.tokens_per_second
        self.tokens_per_second = rate if math.isnan(known) else _MEMORY * known + (1 - _MEMORY) * rate

    @property
    def _pending(self) -> int:
        """Tokens in the queue, and the estimated ones of requests that are being tokenised."""
        return self.queue.tokens + sum(reservation.tokens for reservation in self._reserved)

    def _refusal(self, reason: str) -> QueueFullError:
        """Return the error with the seconds in which the pending tokens will be scored, between 1 and 60."""
        wait = self._pending / self.tokens_per_second
        seconds = max(1, min(60, math.ceil(wait))) if math.isfinite(wait) else 1
        return QueueFullError(f"too busy: {reason}; try again in {seconds} s", retry_after=seconds)


def _queries(request: RerankRequest, info: ModelInfo) -> int:
    """How many times the query is computed."""
    return max(1, len(request.documents)) if info.repeats_query else 1


def _prompt_characters(request: RerankRequest) -> int:
    return _PROMPT_CHARACTERS + _SUFFIX_CHARACTERS * len(request.documents)
