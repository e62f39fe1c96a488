"""The values that travel between the layers: plain records, no behaviour beyond counting.

Everything on the way of a request has a name and a unit here, so that a signature says what it carries.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

MAX_CHUNKS = 64
"""A document is split into at most so many chunks: with 8192 tokens each, a second of tokenising."""


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """What a client asks: rank `documents` by relevance to `query`. Texts as they came, nothing cut."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None
    """Replaces the default instruction of the service when it is given."""
    max_tokens_per_doc: int | None = None
    """Tokens of a document that the model reads at once, where that is less than what fits beside the query."""
    max_chunks_per_doc: int | None = None
    """A longer document is split into up to so many chunks of that size and counts by its best; None: it is cut."""
    truncate: bool = True
    """False: a document of which a part would not be read is an error instead."""
    truncate_query: bool = False
    """True: a query that leaves no room for a document is truncated instead of refused."""
    positions: Sequence[int] | None = None
    """Where each document stands in the client's request, if this is a part of it; errors name documents by that."""

    @property
    def characters(self) -> int:
        """Size of all texts in characters; known before anything is tokenised."""
        return len(self.query) + sum(map(len, self.documents))

    def position(self, index: int) -> int:
        """Where a document of this request stands in the client's."""
        return index if self.positions is None else self.positions[index]

    def only(self, indices: Sequence[int]) -> RerankRequest:
        """The same request for some of its documents."""
        documents, positions = [self.documents[i] for i in indices], [self.position(i) for i in indices]
        return replace(self, documents=documents, positions=positions)


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """The same request in tokens: one prefix, and each document with the suffix behind it."""

    prefix: list[int]
    documents: list[list[int]]
    """What is scored, one logit each: a document, or where `chunks` says so each chunk of it, in order."""
    truncated: frozenset[int] = frozenset()
    """The documents, by index, that did not fit and were cut."""
    chunks: list[list[int]] | None = None
    """None: nothing may be split. Else for each document the characters at which its chunks begin and the last one
    ends: n + 1 numbers for n chunks."""
    cached_prefix_len: int = 0
    """Tokens at the prefix's start that no pass computes again: the model keeps their keys and values."""
    query_truncated: bool = False
    """Whether only the start of the query is in the prefix."""

    @classmethod
    def join(cls, parts: Sequence[EncodedRequest]) -> EncodedRequest:
        """The parts of one request, in order, as one."""
        if len(parts) == 1:
            return parts[0]
        before = list(itertools.accumulate((part.count for part in parts), initial=0))
        return cls(
            parts[0].prefix,
            [document for part in parts for document in part.documents],
            frozenset(start + i for start, part in zip(before, parts, strict=False) for i in part.truncated),
            None if parts[0].chunks is None else [borders for part in parts for borders in part.chunks or []],
            parts[0].cached_prefix_len,
            parts[0].query_truncated,
        )

    @property
    def count(self) -> int:
        """Documents, however many chunks they have."""
        return len(self.documents if self.chunks is None else self.chunks)

    @property
    def tokens(self) -> int:
        """The cost of the request: the prefix's own part once, every document once. The unit of queue and budget."""
        return len(self.prefix) - self.cached_prefix_len + sum(map(len, self.documents))

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
        """Cost in a forward pass: the prefix's own part once, these documents once."""
        return len(self.request.prefix) - self.request.cached_prefix_len + sum(map(len, self.documents))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of these documents' prompts as the model reads them: the prefix in front of every document."""
        return len(self.request.prefix) * (self.stop - self.start) + sum(map(len, self.documents))


@dataclass(slots=True)
class Timings:
    """Where the time of a request went, in seconds."""

    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a document: its place among the document's chunks, and characters `start` to `stop` (exclusive)."""

    index: int
    start: int
    stop: int


class DocumentScore(NamedTuple):
    """What a document got."""

    logit: float
    prompt_tokens: int
    """Of all its prompts, as the model reads them."""
    truncated: bool = False
    best_chunk: Chunk | None = None
    """The one that the logit is from, where the document was split."""
    query_truncated: bool = False
    """Whether only the start of the query was read."""


@dataclass(frozen=True, slots=True)
class RerankResult:
    """The answer: one logit (yes minus no) per document, in the order of the documents."""

    logits: list[float]
    prompt_tokens: int
    truncated_documents: int
    timings: Timings = field(default_factory=Timings)
    best_chunks: Mapping[int, Chunk] = field(default_factory=dict)
    """By document index: the chunk that a document which was split got its logit from."""
    query_truncated: bool = False
    """Whether only the start of the query was read."""

    @classmethod
    def of(cls, scores: Sequence[DocumentScore], timings: Timings | None = None) -> RerankResult:
        """The result of documents in their order."""
        return cls(
            [score.logit for score in scores],
            sum(score.prompt_tokens for score in scores),
            sum(score.truncated for score in scores),
            timings or Timings(),
            {i: score.best_chunk for i, score in enumerate(scores) if score.best_chunk is not None},
            any(score.query_truncated for score in scores),
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What was loaded and chosen, for logs and answers."""

    name: str
    device: str
    precision: str
    max_seq_length: int
    max_batch_tokens: int
    demo: bool = False
    self_check: str = "passed"
    """Whether obvious pairs were ranked right at the start: `passed`, or `failed: ` and the languages."""
