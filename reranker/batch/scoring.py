"""Rows in, result records out: the scoring loop that a batch on this machine and an actor of Ray have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from reranker.errors import InputError, InvalidRequestError, RerankError
from reranker.rankers.ranker import Ranker, Scored
from reranker.rows.groups import groups, request_of
from reranker.rows.row import Row
from reranker.terminal import plural, truncated
from reranker.types import RerankRequest

Note = Callable[[Iterable[str], str], None]
"""Takes texts, and the place of all of them; see `Notes.add`."""


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
    requests = _Requests(rows, stop_at_bad)
    for answer in requests.answers(ranker):
        for row in answer.rows:
            note(row.warnings, f"{row.place}: ")
        yield answer
    if requests.failure:
        raise requests.failure


class _Requests:
    """The requests of rows; a ranker may read them in a thread, while the caller consumes the answers."""

    def __init__(self, rows: Iterable[Row], stop_at_bad: bool) -> None:
        self.rows, self.stop_at_bad = rows, stop_at_bad
        self.pending: deque[list[Row]] = deque()
        self.failure: InputError | None = None

    def answers(self, ranker: Ranker) -> Iterator[Answer]:
        """Yield the answer to each group; one without a request keeps its place in the order."""
        for outcome in ranker.rank_many(self._read()):
            yield from self._unscorable()
            yield Answer(self.pending.popleft(), outcome)
        yield from self._unscorable()

    def _read(self) -> Iterator[RerankRequest]:
        for group in groups(self._readable()):
            self.pending.append(group)
            if (request := request_of(group)) is not None:
                yield request
            elif self.stop_at_bad:
                return

    def _readable(self) -> Iterator[Row]:
        try:
            yield from self.rows
        except InputError as error:
            self.failure = error

    def _unscorable(self) -> Iterator[Answer]:
        while self.pending and self.pending[0][0].request is None:
            group = self.pending.popleft()
            yield Answer(group, InvalidRequestError(group[0].error))


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
            return
        self.truncated += answer.outcome.truncated
        self.queries += answer.outcome.query_truncated

    def summary(self, seconds: float, bad: str, unit: str = "row", url: str | None = None) -> Iterator[str]:
        """Yield lines for people; `bad` is the place of the reasons for bad rows, `url` a service that truncated."""
        rate = self.documents / max(seconds, 1e-6)
        documents = plural(self.documents, "document")
        yield f"{plural(self.rows, unit)}, {documents} in {seconds:.1f} s ({rate:,.0f} documents/s)"
        if self.bad:
            yield f"{plural(self.bad, f'bad {unit}')} {'was' if self.bad == 1 else 'were'} skipped; see {bad}"
        if self.truncated:
            yield truncated(self.truncated, url)
        if self.queries:
            yield truncated(self.queries, url, "query", "queries")
