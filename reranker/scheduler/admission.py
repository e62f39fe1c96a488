"""Whether a request may wait: decided from its size in characters, before anything is spent on it.

What waits must be done in time, or nobody gains: a request is accepted while all that waits and itself are at most
`max_queue_tokens`, and at the measured speed no more work than can be done in its time. The queue gives the oldest
request half of every pass and small ones the other half (queue.py), so half the speed is what each is sure of; and
small ones are counted among themselves, so that huge ones cannot keep them out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat

from reranker.errors import QueueFullError
from reranker.scheduler.queue import TokenQueue, small
from reranker.types import MAX_CHUNKS, EncodedRequest, ModelInfo, RerankRequest

# Half of the speed, and a little less for the passes that are on their way already.
_SHARE_OF_TIME = 0.4
# Before anything was tokenised; what is typical for English. Chinese has twice as many.
_TOKENS_PER_CHARACTER = 0.3
# What the prompt adds to each request and to each document, as text of so many tokens: else short texts, which are
# mostly prompt, would teach that long ones are ten times what they are.
_PROMPT_CHARACTERS, _SUFFIX_CHARACTERS = 300, 40
# Weight of what was learned before, each time that something is learned.
_MEMORY = 0.8


class Admission:
    """Knows how much waits before the queue, how long texts are in tokens and how fast the device is.

    Args:
        max_queue_tokens: tokens that may wait. One request larger than that is accepted while nothing else waits.
        queue: what waits and is tokenised.
    """

    def __init__(self, max_queue_tokens: int, queue: TokenQueue) -> None:
        self.max_queue_tokens = max_queue_tokens
        self.queue = queue
        self._encoding: list[int] = []
        """Estimated tokens of each request that is being tokenised."""
        self._tokens, self._characters = _TOKENS_PER_CHARACTER, 1.0
        self.tokens_per_second = math.nan
        """Of the device with enough to do; NaN before it was measured."""

    def check(self, budget: int, seconds: float, tokens: int = 1) -> None:
        """Is there room for so many tokens, of a request that has so many seconds; `budget`: those of a forward pass.

        Raises:
            QueueFullError: says when to come back.
        """
        room = float(self.max_queue_tokens)
        if math.isfinite(self.tokens_per_second):
            room = min(room, self.tokens_per_second * seconds * _SHARE_OF_TIME)
        waiting = self.queue.tokens + sum(self._encoding)
        if tokens <= small(budget) and waiting + tokens > room:
            waiting = self.queue.tokens_up_to(small(budget)) + sum(t for t in self._encoding if t <= small(budget))
        if waiting and waiting + tokens > room:
            raise self.refusal(f"about {waiting} tokens wait")

    @contextmanager
    def encoding(self, request: RerankRequest, info: ModelInfo, seconds: float) -> Iterator[None]:
        """Hold the place of a request while it is tokenised.

        Raises:
            QueueFullError: there is no room for it.
        """
        tokens = self._estimate(request, info)
        self.check(info.max_batch_tokens, seconds, tokens)
        self._encoding.append(tokens)
        try:
            yield
        finally:
            self._encoding.remove(tokens)

    def encoded(self, request: RerankRequest, result: EncodedRequest) -> None:
        """Learn how many tokens a character is worth; large requests teach more than small ones."""
        if not (result.truncated or result.query_truncated):
            self._tokens = (
                self._tokens * _MEMORY + result.tokens + result.cached_prefix_len
            )  # what is kept has its characters too
            prompt = _PROMPT_CHARACTERS + _SUFFIX_CHARACTERS * len(request.documents)
            self._characters = self._characters * _MEMORY + prompt + request.characters

    def scored(self, tokens: int, seconds: float) -> None:
        """Learn the speed, from a pass that had enough to do."""
        rate = tokens / max(seconds, 1e-6)
        known = self.tokens_per_second
        self.tokens_per_second = rate if math.isnan(known) else _MEMORY * known + (1 - _MEMORY) * rate

    def refusal(self, why: str) -> QueueFullError:
        """The error that names the time after which all that waits now is done, between 1 and 60 seconds."""
        wait = (self.queue.tokens + sum(self._encoding)) / self.tokens_per_second
        seconds = max(1, min(60, math.ceil(wait))) if math.isfinite(wait) else 1
        return QueueFullError(f"too busy: {why}; try again in {seconds} s", retry_after=seconds)

    def _estimate(self, request: RerankRequest, info: ModelInfo) -> int:
        rate = self._tokens / self._characters
        chunks = min(request.max_chunks_per_doc or 1, MAX_CHUNKS)
        most = max(0, int(info.max_seq_length * chunks / rate) - _SUFFIX_CHARACTERS)
        read = sum(map(min, map(len, request.documents), repeat(most))) + _SUFFIX_CHARACTERS * len(request.documents)
        query = min(len(request.query), int(info.max_seq_length / rate))  # of a longer one no more is read
        return int(rate * (_PROMPT_CHARACTERS + query + read)) + 1
