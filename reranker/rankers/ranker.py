"""A model in this process or a running service, behind one method with the same scores."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from reranker.cli.options import Source
from reranker.errors import RerankError
from reranker.terminal import loading
from reranker.types import RerankRequest


@dataclass(frozen=True, slots=True)
class Scored:
    """The answer to a request."""

    scores: list[float]
    """Probabilities of "yes", in the order of the documents."""
    truncated: int
    """How many documents did not fit and were cut."""
    query_truncated: bool = False
    """Whether only the start of the query was read."""

    def best(self, top_k: int | None) -> list[int]:
        """Indices of the documents, best first, ties by index; all when `top_k` is None or too large."""
        return sorted(range(len(self.scores)), key=lambda i: (-self.scores[i], i))[:top_k]


class Ranker(Protocol):
    """Scores requests; the one interface that commands use."""

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        """For each request, in order, its scores or why it has none; takes a little more than it has answered.

        Raises:
            FailedError: no request can be scored any more.
        """

    @property
    def facts(self) -> dict[str, str]:
        """The model or service, for people."""


def open_ranker(source: Source) -> Ranker:
    """Load the model, or find the service.

    Raises:
        ModelLoadError: the model cannot be served.
        FailedError: the service does not answer.
    """
    if source.url:
        from reranker.rankers.client import Client

        return Client(source.url, source.token)
    name = source.model["model"]
    # A download draws bars of its own.
    with loading(f"{name or 'demo'} ({source.model['device']})", quiet=bool(name) and not os.path.isdir(name)):
        from reranker.rankers.local import Local

        return Local(source.model)


def rank_one(ranker: Ranker, request: RerankRequest) -> Scored:
    """The scores of one request.

    Raises:
        RerankError: it has none.
    """
    outcome = next(iter(ranker.rank_many([request])))
    if isinstance(outcome, RerankError):
        raise outcome
    return outcome
