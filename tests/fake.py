"""A scorer with times and faults set by a test: its logits count the words that document and query share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from reranker.errors import InvalidRequestError
from reranker.types import EncodedRequest, ModelInfo, RerankRequest, Slice

PREFIX = 10


class FakeLanes:
    """Lanes whose idleness a test sets; a pass with them may overlap with another one."""

    def __init__(self) -> None:
        self.idle = False
        self.on_idle: Callable[[], None] = lambda: None


class FakeScorer:
    """One token per word, a prefix of `PREFIX` tokens, and `seconds` of sleep per forward pass."""

    def __init__(
        self, *, seconds: float = 0.0, max_batch_tokens: int = 1000, max_batch_documents: int = 10_000
    ) -> None:
        self.seconds = seconds
        self.max_batch_tokens = max_batch_tokens
        self.max_batch_documents = max_batch_documents
        self.lanes: FakeLanes | None = None
        self.passes: list[list[Slice]] = []
        self.words: dict[str, int] = {}
        self.threads: set[str] = set()
        self.hold = threading.Event()
        """While it is cleared, forward passes wait."""
        self.hold.set()

    @property
    def info(self) -> ModelInfo:
        return ModelInfo(
            "fake", "cpu", "float32", 8192, self.max_batch_tokens, family="Qwen3", score="logit(yes) - logit(no)"
        )

    @property
    def memory(self) -> int:
        return 1 << 20

    def encode(self, request: RerankRequest) -> EncodedRequest:
        self.threads.add(threading.current_thread().name)
        if "too long" in request.query:
            raise InvalidRequestError("the query leaves no room for a document")
        query = [self._id(word) for word in request.query.split()]
        documents = [[self._id(word) for word in d.split()] or [0] for d in request.documents]
        return EncodedRequest((query + [0] * PREFIX)[:PREFIX], documents)

    def pack(self, slices: Sequence[Slice]) -> list[Slice]:
        return list(slices)

    def score(self, batch: list[Slice]) -> list[float]:
        self.threads.add(threading.current_thread().name)
        self.passes.append(batch)
        self.hold.wait(300)
        time.sleep(self.seconds)
        text = {word for s in batch for d in s.documents for word in self._words(d)}
        if "poison" in text:
            raise RuntimeError("a kernel failed")
        return [
            float("nan") if "nan" in self._words(d) else float(len(set(d) & set(s.request.prefix) - {0}))
            for s in batch
            for d in s.documents
        ]

    def _id(self, word: str) -> int:
        return self.words.setdefault(word, len(self.words) + 1)

    def _words(self, ids: list[int]) -> set[str]:
        names = {i: word for word, i in self.words.items()}
        return {names[i] for i in ids if i in names}
