"""The real application around a device that waits: a pass of T tokens takes OVERHEAD + T / RATE seconds, no processor.

So the two cores of a small machine are free for the service around the model. One token a word.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from app import create_app
from config import load_settings
from reranker.types import EncodedRequest, ModelInfo, RerankRequest, Slice

PREFIX = 50
"""Tokens of every request's prefix, beside its documents."""


class SleepingScorer:
    """The scorer that the batcher sees."""

    memory = 0
    max_batch_documents = 1 << 30
    lanes = None

    def __init__(self) -> None:
        self.rate = float(os.environ["RATE"])
        self.overhead = float(os.environ.get("OVERHEAD", "0"))
        self.max_batch_tokens = int(os.environ["BATCH_TOKENS"])

    @property
    def info(self) -> ModelInfo:
        """The response of /info."""
        return ModelInfo("sleeping", "none", "float32", 8192, self.max_batch_tokens)

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """One token a word, all alike."""
        return EncodedRequest([0] * PREFIX, [[0] * (1 + document.count(" ")) for document in request.documents])

    def pack(self, slices: Sequence[Slice]) -> list[Slice]:
        """Nothing to lay out."""
        return list(slices)

    def score(self, batch: list[Slice]) -> list[float]:
        """Wait as long as the tokens take."""
        time.sleep(self.overhead + sum(part.tokens for part in batch) / self.rate)
        return [0.0 for part in batch for _ in range(part.stop - part.start)]


app = create_app(load_settings(), SleepingScorer)
