"""The records that the packages exchange: requests, tokens, scores. No behaviour beyond counting."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

MAX_CHUNKS = 64
"""Max chunks of a document: with 8192 tokens each, they take a second to tokenise."""


@dataclass(frozen=True, slots=True)
class RerankRequest:
    """A client's request to rank `documents` by relevance to `query`; texts as received, not truncated."""

    query: str
    documents: Sequence[str]
    instruction: str | None = None
    """None: the service's default instruction."""
    max_tokens_per_doc: int | None = None
    """Max tokens of a document, or of a chunk, if that is less than the room beside the query."""
    max_chunks_per_doc: int | None = None
    """Max chunks of a longer document, which is then scored by its best chunk; None: it is truncated."""
    truncate: bool = True
    """False: a document that would have to be truncated is an error."""
    truncate_query: bool = False
    """True: a query that leaves no room for a document is truncated, not refused."""
    positions: Sequence[int] | None = None
    """Each document's index in the client's request, if this is a part of it; error texts use it."""
    query_index: int | None = None
    """The query's index in the client's request, if that has several; error texts use it."""

    @property
    def characters(self) -> int:
        """Characters of query and documents; known before anything is tokenised."""
        return len(self.query) + sum(map(len, self.documents))

    def position(self, index: int) -> int:
        """Index in the client's request of a document of this one."""
        return index if self.positions is None else self.positions[index]

    def only(self, indices: Sequence[int]) -> RerankRequest:
        """Return the request with some of its documents."""
        documents, positions = [self.documents[i] for i in indices], [self.position(i) for i in indices]
        return replace(self, documents=documents, positions=positions)


@dataclass(frozen=True, slots=True)
class EncodedRequest:
    """A tokenised request: one prefix, and each document followed by the suffix."""

    prefix: list[int]
    """Tokens before every document, computed once; empty where each document holds the whole prompt."""
    documents: list[list[int]]
    """In order, one logit each: the documents, or their chunks where `chunks` is set."""
    truncated: frozenset[int] = frozenset()
    """Indices of the documents that were truncated."""
    chunks: list[list[int]] | None = None
    """For each document the characters at which its chunks begin and the last one ends: n + 1 numbers for n chunks;
    None: documents are not split."""
    cached_prefix_len: int = 0
    """Tokens at the prefix's start whose keys and values the model has cached."""
    query_truncated: bool = False
    """Whether the query in the prefix is truncated."""

    @classmethod
    def join(cls, parts: Sequence[EncodedRequest]) -> EncodedRequest:
        """Join the parts of one request, in order."""
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
        """Number of documents; chunks do not count."""
        return len(self.documents if self.chunks is None else self.chunks)

    @property
    def tokens(self) -> int:
        """Cost in queue and budget: the prefix without its cached part once, every document once."""
        return len(self.prefix) - self.cached_prefix_len + sum(map(len, self.documents))


@dataclass(frozen=True, slots=True)
class Slice:
    """Documents `start` to `stop` (exclusive) of a request, for one forward pass."""

    request: EncodedRequest
    start: int
    stop: int

    @property
    def documents(self) -> list[list[int]]:
        """Token ids of this slice's documents."""
        return self.request.documents[self.start : self.stop]

    @property
    def tokens(self) -> int:
        """Cost in a forward pass: the prefix without its cached part once, these documents once."""
        return len(self.request.prefix) - self.request.cached_prefix_len + sum(map(len, self.documents))

    @property
    def prompt_tokens(self) -> int:
        """Tokens of these documents' prompts: the whole prefix once per document."""
        return len(self.request.prefix) * (self.stop - self.start) + sum(map(len, self.documents))


@dataclass(slots=True)
class Timings:
    """Seconds that a request spent in each stage."""

    tokenization: float = 0.0
    queue: float = 0.0
    inference: float = 0.0
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a document: its index among the chunks, and characters `start` to `stop` (exclusive)."""

    index: int
    start: int
    stop: int


class DocumentScore(NamedTuple):
    """The score of a document."""

    logit: float
    prompt_tokens: int
    """Of all its prompts, each with the whole prefix."""
    truncated: bool = False
    best_chunk: Chunk | None = None
    """The chunk with the highest logit, if the document was split."""
    query_truncated: bool = False
    """Whether the query was truncated."""


@dataclass(frozen=True, slots=True)
class RerankResult:
    """The result of a request: one logit per document, in the order of the documents."""

    logits: list[float]
    prompt_tokens: int
    truncated_documents: int
    timings: Timings = field(default_factory=Timings)
    best_chunks: Mapping[int, Chunk] = field(default_factory=dict)
    """The best chunk of each document that was split, by the document's index."""
    query_truncated: bool = False
    """Whether the query was truncated."""

    @classmethod
    def of(cls, scores: Sequence[DocumentScore], timings: Timings | None = None) -> RerankResult:
        """Join the scores of all documents, in their order."""
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
    """The loaded model and the choices made at load, for logs and responses."""

    name: str
    device: str
    precision: str
    max_seq_length: int
    max_batch_tokens: int
    demo: bool = False
    self_check: str = "passed"
    """Result of ranking obvious texts at load: `passed`, or `failed: ` and the languages."""
    family: str = ""
    """The architecture that is computed."""
    score: str = ""
    """The logit of a document, in words."""
    prompt: str = ""
    """Where the prompt is written down."""
    reads_instruction: bool = True
    """Whether the prompt has an instruction."""
    repeats_query: bool = False
    """Whether the tokens of every document hold the query: the document is before it, or an encoder reads both."""
    adapter: str = ""
    """The LoRA adapter that is merged into the weights: folder, rank, base; empty: none."""

    @property
    def summary(self) -> str:
        """One line for the log."""
        return (
            f"{self.name}{' (the demo model, for trying the API only)' if self.demo else ''} on {self.device} in "
            f"{self.precision}, {self.family}; at most {self.max_seq_length} tokens per prompt and "
            f"{self.max_batch_tokens} per forward pass; score: {self.score}; self-check {self.self_check}"
        )
