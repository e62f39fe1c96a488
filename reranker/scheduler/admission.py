"""Admission: accept or refuse a request by its size in characters, before it is tokenised.

A request is accepted if it and the pending ones are at most `max_queue_tokens`, and at most the work that the measured
speed allows within its time. Half of every pass is for the oldest request and half for small ones (queue.py), so half
of the speed is guaranteed to each. Small requests are counted among themselves: huge ones cannot exclude them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat

from reranker.errors import QueueFullError
from reranker.scheduler.queue import TokenQueue, max_small_tokens
from reranker.types import MAX_CHUNKS, EncodedRequest, ModelInfo, RerankRequest

# Half of the speed, less a margin for the passes in flight.
_SHARE_OF_TIME = 0.4
# Initial value, typical of English; Chinese has twice as many.
_TOKENS_PER_CHARACTER = 0.3
# The prompt's own text, in characters, per request and per document. Without it, requests of short texts, which are
# mostly prompt, would raise the estimate for long texts tenfold.
_PROMPT_CHARACTERS, _SUFFIX_CHARACTERS = 300, 40
# Weight of the previous value in each moving average.
_MEMORY = 0.8


class Admission:
    """The limits of a worker, and moving averages of its speed and of tokens per character.

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
        self._reserved: list[int] = []
        """Estimated tokens of each request that is being tokenised."""
        self._tokens, self._characters = _TOKENS_PER_CHARACTER, 1.0
        self.tokens_per_second = math.nan
        """Of full passes; NaN before the first one."""

    def check(self, max_batch_tokens: int, seconds: float, tokens: int = 1) -> None:
        """Check that a request of `tokens` may be accepted and can be scored within `seconds`.

        Raises:
            QueueFullError: it may not; the error says when to try again.
        """
        if self.requests >= self.max_requests:
            raise self._refusal(f"{self.requests} requests are in progress")
        limit = float(self.max_queue_tokens)
        if math.isfinite(self.tokens_per_second):
            limit = min(limit, self.tokens_per_second * seconds * _SHARE_OF_TIME)
        pending = self._pending
        small = max_small_tokens(max_batch_tokens)
        if tokens <= small and pending + tokens > limit:
            pending = self.queue.tokens_up_to(small) + sum(t for t in self._reserved if t <= small)
        if pending and pending + tokens > limit:
            raise self._refusal(f"about {pending} tokens are pending")

    @contextmanager
    def reserve(self, tokens: int) -> Iterator[None]:
        """Count `tokens` as pending while their request is tokenised."""
        self._reserved.append(tokens)
        try:
            yield
        finally:
            self._reserved.remove(tokens)

    def estimate(self, request: RerankRequest, info: ModelInfo) -> int:
        """Estimate the tokens of a request; texts count up to the length that the model reads."""
        rate = self._tokens / self._characters
        chunks = min(request.max_chunks_per_doc or 1, MAX_CHUNKS)
        max_document = max(0, int(info.max_seq_length * chunks / rate) - _SUFFIX_CHARACTERS)
        documents = sum(map(min, map(len, request.documents), repeat(max_document)))
        query = min(len(request.query), int(info.max_seq_length / rate))
        return int(rate * (_prompt_characters(request) + query + documents)) + 1

    def observe_tokens(self, request: RerankRequest, encoded: EncodedRequest) -> None:
        """Update tokens per character, weighted by the request's size; skip a request with truncated texts."""
        if encoded.truncated or encoded.query_truncated:
            return
        # The cached part of the prefix counts: _PROMPT_CHARACTERS has its characters.
        self._tokens = self._tokens * _MEMORY + encoded.tokens + encoded.cached_prefix_len
        self._characters = self._characters * _MEMORY + _prompt_characters(request) + request.characters

    def observe_speed(self, tokens: int, seconds: float) -> None:
        """Update the speed from a pass that was at least half full."""
        rate = tokens / max(seconds, 1e-6)
        known = self.tokens_per_second
        self.tokens_per_second = rate if math.isnan(known) else _MEMORY * known + (1 - _MEMORY) * rate

    @property
    def _pending(self) -> int:
        """Tokens in the queue, and the estimated ones of requests that are being tokenised."""
        return self.queue.tokens + sum(self._reserved)

    def _refusal(self, reason: str) -> QueueFullError:
        """Return the error with the seconds in which the pending tokens will be scored, between 1 and 60."""
        wait = self._pending / self.tokens_per_second
        seconds = max(1, min(60, math.ceil(wait))) if math.isfinite(wait) else 1
        return QueueFullError(f"too busy: {reason}; try again in {seconds} s", retry_after=seconds)


def _prompt_characters(request: RerankRequest) -> int:
    return _PROMPT_CHARACTERS + _SUFFIX_CHARACTERS * len(request.documents)
