"""Rows in, result records out: the scoring loop of a batch on this machine and of an actor of Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from reranker.errors import InputError, InvalidRequestError, RerankError
from reranker.rankers.ranker import Ranker, Scored
from reranker.rows.row import Row
from reranker.terminal import plural, truncated
from reranker.types import RerankRequest

Note = Callable[[Iterable[str], str], None]
"""Takes texts, and the place of all of them; see `Notes.add`."""

_MAX_PAIRS = 256
_MAX_CHARACTERS = 10_000
"""A pair with a longer document stays alone: sharing the query saves it little, and its errors are its own."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Rows that were one request, and their scores or their error."""

    rows: list[Row]
    outcome: Scored | RerankError

    @property
    def documents(self) -> int:
        """How many documents were scored."""
        return len(self.outcome.scores) if isinstance(self.outcome, Scored) else 0

    @property
    def records(self) -> list[tuple[int, dict[str, Any]]]:
        """Number and output record of each row."""
        if isinstance(self.outcome, RerankError):
            return [(row.number, {"id": row.id, "error": str(self.outcome)}) for row in self.rows]
        scores = self.outcome.scores
        if self.rows[0].pair:
            pairs = zip(self.rows, scores, strict=True)
            return [(row.number, {"id": row.id, "score": score}) for row, score in pairs]
        [row] = self.rows
        results = [{"index": i, "score": scores[i]} for i in self.outcome.best(row.top_k)]
        return [(row.number, {"id": row.id, "results": results})]


def answers(ranker: Ranker, rows: Iterable[Row], note: Note, *, stop_at_bad: bool = False) -> Iterator[Answer]:
    """Score rows, which the ranker reads ahead; every row has one answer, in order. Warnings of rows go to `note`.

    Raises:
        InputError: `rows` ended early; after the answers to all rows before.
        RerankError: the model cannot go on; an error of one request alone is its outcome.
    """
    pending: deque[list[Row]] = deque()
    failure: InputError | None = None

    def readable() -> Iterator[Row]:
        nonlocal failure
        try:
            yield from rows
        except InputError as error:
            failure = error

    def requests() -> Iterator[RerankRequest]:
        for group in groups(readable()):
            pending.append(group)
            if (request := group[0].request) is not None:
                documents = [text for row in group if row.request for text in row.request.documents]
                yield replace(request, documents=documents)
            elif stop_at_bad:
                return

    for outcome in chain(ranker.rank_many(requests()), [None]):  # None: every row is read
        while pending and pending[0][0].request is None:  # it keeps its place in the order
            bad = pending.popleft()
            yield Answer(bad, InvalidRequestError(bad[0].error))
        if outcome is not None:
            group = pending.popleft()
            for row in group:
                note(row.warnings, f"{row.place}: ")
            yield Answer(group, outcome)
    if failure is not None:
        raise failure


def groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield neighbouring pairs of one query together, because they share its prefix; every other row alone."""
    group: list[Row] = []
    for row in rows:
        if group and (len(group) == _MAX_PAIRS or _shared(row) != _shared(group[0])):
            yield group
            group = []
        group.append(row)
        if _shared(row) is None:
            yield group
            group = []
    if group:
        yield group


def _shared(row: Row) -> RerankRequest | None:
    """Return the part of a request that pairs of one group have in common; None for a row that stays alone.

    A pair whose document may not be truncated stays alone, because its error would fail the other pairs.
    """
    request = row.request if row.pair else None
    if request is None or not request.truncate or len(request.documents[0]) > _MAX_CHARACTERS:
        return None
    return replace(request, documents=())


@dataclass(slots=True)
class Totals:
    """Counts over rows: all of them, bad ones, scored documents, truncated documents and queries."""

    rows: int = 0
    bad: int = 0
    documents: int = 0
    truncated: int = 0
    queries: int = 0

    def add(self, answer: Answer) -> None:
        """Count the rows of an answer."""
        self.rows += len(answer.rows)
        self.documents += answer.documents
        if isinstance(answer.outcome, RerankError):
            self.bad += len(answer.rows)
        else:
            self.truncated += answer.outcome.truncated
            self.queries += answer.outcome.query_truncated

    def speed(self, seconds: float, unit: str = "row") -> str:
        """Return a line for people."""
        rate = self.documents / max(seconds, 1e-6)
        documents = plural(self.documents, "document")
        return f"{plural(self.rows, unit)}, {documents} in {seconds:.1f} s ({rate:,.0f} documents/s)"

    def losses(self, bad: str, unit: str = "row", url: str | None = None) -> Iterator[str]:
        """Yield lines for people; `bad` is the place of the reasons for bad rows, `url` a service that truncated."""
        if self.bad:
            yield f"{plural(self.bad, f'bad {unit}')} {'was' if self.bad == 1 else 'were'} skipped; see {bad}"
        if self.truncated:
            yield truncated(self.truncated, url)
        if self.queries:
            yield truncated(self.queries, url, "query", "queries")
