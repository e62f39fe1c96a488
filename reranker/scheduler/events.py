"""What the batcher tells whoever watches it. The batcher knows only this; metrics.py is the one that counts."""

from __future__ import annotations

from dataclasses import dataclass

from reranker.types import ModelInfo, RerankResult


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One batch that the device has scored."""

    documents: int
    tokens: int
    """In the packed sequence: of every prefix what the model does not keep, once."""
    prompt_tokens: int
    """The same prompts as the model reads them: the prefix in front of every document."""
    budget: int
    """Most tokens that the pass could have taken."""
    seconds: float
    memory: int
    """Bytes of the device's memory that this process holds behind the pass."""


class Observer:
    """Sees everything and does nothing. The methods are called on the event loop and must return at once."""

    def status_changed(self, status: str) -> None:
        """The batcher is now "loading", "ok", "draining" or "unhealthy"."""

    def loaded(self, info: ModelInfo, memory: int) -> None:
        """The scorer is there and holds `memory` bytes of its device."""

    def queue_changed(self, tokens: int) -> None:
        """So many tokens wait now."""

    def request_started(self, wait: float) -> None:
        """The first document of a request goes to the device, `wait` seconds after it was queued."""

    def pass_ended(self, done: ForwardPass) -> None:
        """The device has scored a batch."""

    def cache_used(self, hits: int, misses: int) -> None:
        """A request has all its logits: of so many documents they were known, of so many they had to be computed."""

    def request_scored(self, result: RerankResult) -> None:
        """A request has all its logits."""
