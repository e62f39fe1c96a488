"""The values that travel between the layers: plain dataclasses, no behaviour beyond counting.

Everything on the way of a request has a name and a unit here, so that a signature says what it carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """What a client asks: rank `documents` by relevance to `query`. Texts as they came, nothing cut."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None
    """Replaces the default instruction of the service when it is given."""

    @property
    def characters(self) -> int:
        """Size of all texts in characters; known before anything is tokenised."""
        return len(self.query) + sum(map(len, self.documents))


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """The same request in tokens: one prefix, and each document with the suffix behind it."""

    prefix: list[int]
    documents: list[list[int]]
    truncated: int = 0
    """How many documents did not fit and were cut."""

    @property
    def tokens(self) -> int:
        """The cost of the request: the prefix once, every document once. The unit of every queue and budget."""
        return len(self.prefix) + sum(map(len, self.documents))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompts as the model reads them: the prefix in front of every document."""
        return len(self.prefix) * len(self.documents) + sum(map(len, self.documents))


@dataclass(frozen=True, slots=True)
class Slice:
    """Documents `start` to `stop` (exclusive) of a request: what one forward pass takes of it."""

    request: EncodedRequest
    start: int
    stop: int

    @property
    def documents(self) -> list[list[int]]:
        """The token ids of the documents of this slice."""
        return self.request.documents[self.start : self.stop]

    @property
    def tokens(self) -> int:
        """Cost in a forward pass: the prefix once, these documents once."""
        return len(self.request.prefix) + sum(map(len, self.documents))


@dataclass(slots=True)
class Timings:
    """Where the time of a request went, in seconds."""

    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class RerankResult:
    """The answer: one logit (yes minus no) per document, in the order of the documents."""

    logits: list[float]
    prompt_tokens: int
    truncated_documents: int
    timings: Timings = field(default_factory=Timings)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded and chosen, for logs and answers."""

    name: str
    device: str
    precision: str
    max_seq_length: int
    max_batch_tokens: int
    demo: bool = False
