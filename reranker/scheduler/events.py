"""Events of the batcher, and the Protocol of their observer: http/metrics.py implements it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from reranker.types import ModelInfo, RerankResult

Status = Literal["loading", "ok", "draining", "unhealthy"]


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One scored batch."""

    documents: int
    tokens: int
    """Of the packed sequence: each prefix once, without its cached part."""
    prompt_tokens: int
    """Of the same prompts as the model reads them: the prefix before every document."""
    budget: int
    """Max tokens of the pass."""
    seconds: float
    memory: int
    """Bytes of device memory held by this process after the pass."""


class Observer(Protocol):
    """An observer of the batcher. Its methods run on the event loop and must return immediately."""

    def status_changed(self, status: Status) -> None:
        """The batcher has a new status."""

    def loaded(self, info: ModelInfo, memory: int) -> None:
        """The scorer is loaded and holds `memory` bytes of its device."""

    def queue_changed(self, tokens: int) -> None:
        """`tokens` are pending now."""

    def queue_limit_changed(self, tokens: float) -> None:
        """The queue accepts up to `tokens` now."""

    def request_started(self, wait: float) -> None:
        """The first document of a request goes to the device, `wait` seconds after the request was queued."""

    def pass_ended(self, forward_pass: ForwardPass) -> None:
        """The device has scored a batch."""

    def cache_used(self, hits: int, misses: int) -> None:
        """A request was answered with the scores of `hits` cached documents and `misses` computed ones."""

    def request_scored(self, result: RerankResult) -> None:
        """A request has all its scores."""


class NullObserver:
    """An observer that ignores every event."""

    def _ignore(self, *args: Any, **kwargs: Any) -> None: ...

    status_changed = loaded = queue_changed = queue_limit_changed = _ignore
    request_started = pass_ended = cache_used = request_scored = _ignore
