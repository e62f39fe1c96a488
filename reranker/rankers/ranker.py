"""The interface of everything that scores requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from reranker.errors import RerankError
from reranker.types import RerankRequest


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of a request."""

    scores: list[float]
    """Probabilities of "yes", in the order of the documents."""
    truncated: int
    """Number of truncated documents."""
    query_truncated: bool = False
    """Whether the query was truncated."""

    def best(self, top_k: int | None) -> list[int]:
        """Return indices of documents, best first, ties by index; all if `top_k` is None or too large."""
        return sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))[:top_k]


class Ranker(Protocol):
    """Scores requests: a model in this process or a running service."""

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        """Yield the scores, or the error, of each request in order; reads a few requests ahead.

        Raises:
            FailedError: no further request can be scored.
        """

    @property
    def facts(self) -> Mapping[str, Any]:
        """Properties of the model or service, for display."""


def rank_one(ranker: Ranker, request: RerankRequest) -> Scored:
    """Return the scores of one request, or raise its RerankError."""
    outcome = next(iter(ranker.rank_many([request])))
    if isinstance(outcome, RerankError):
        raise outcome
    return outcome
