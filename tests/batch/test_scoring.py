"""Rows scored in groups: which requests they become, and the records of their results."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from reranker.batch.scoring import Answer, Totals, answers
from reranker.errors import InputError, InvalidRequestError, RerankError
from reranker.notes import Notes
from reranker.rankers.ranker import Scored
from reranker.rows.inputs import Record
from reranker.rows.row import Defaults, Row, read_row
from reranker.types import RerankRequest


class Words:
    """A ranker: the score of a document is its number of words; keeps its requests."""

    def __init__(self) -> None:
        self.requests: list[RerankRequest] = []

    facts: dict[str, str] = {}  # noqa: RUF012

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        for request in requests:
            self.requests.append(request)
            if request.query == "refused":
                yield InvalidRequestError("no room")
            else:
                yield Scored([float(len(document.split())) for document in request.documents], 1)


def rows(values: Iterable[Any], top_k: int | None = None) -> Iterator[Row]:
    for number, value in enumerate(values, 1):
        yield read_row(Record(number, f"line {number}", number, value), Defaults(top_k))


def scored(ranker: Words, values: Iterable[Any]) -> list[Answer]:
    return list(answers(ranker, rows(values), Notes(print).add))


def test_pairs_of_one_query_share_a_request() -> None:
    values: list[Any] = [
        {"id": 0, "query": "q", "document": "a b"},
        {"id": 1, "query": "q", "document": {"text": "a"}},
        {"id": 2, "query": "q", "document": "a b c", "instruction": "i"},
        {"id": 3, "query": "q", "document": None},
        {"id": 4, "query": "refused", "document": "a"},
        {"id": 5, "query": "refused", "document": "b"},
        {"id": 6, "query": "q", "documents": ["a", "a b"], "top_k": 1},
        {"id": 7, "query": "q", "document": "a"},
    ]
    ranker, totals = Words(), Totals()
    results = scored(ranker, values)
    assert [request.documents for request in ranker.requests] == [
        ["a b", "a"],
        ["a b c"],
        ["a", "b"],
        ["a", "a b"],
        ["a"],
    ]
    error = 'document: must be a string or an object with a string "text" (or "content", "page_content"); got null'
    assert [record for answer in results for record in answer.records] == [
        (1, {"id": 0, "score": 2.0}),
        (2, {"id": 1, "score": 1.0}),
        (3, {"id": 2, "score": 3.0}),
        (4, {"id": 3, "error": error}),
        (5, {"id": 4, "error": "no room"}),
        (6, {"id": 5, "error": "no room"}),
        (7, {"id": 6, "results": [{"index": 1, "score": 2.0}]}),
        (8, {"id": 7, "score": 1.0}),
    ]
    for answer in results:
        totals.add(answer)
    assert totals == Totals(rows=8, bad=3, documents=6, truncated=4)


def test_pairs_that_may_not_be_truncated_fail_alone() -> None:
    values = [{"id": i, "query": "q", "document": "d", "truncate": False} for i in range(2)]
    values += [{"id": i, "query": "q", "document": "d", "max_tokens_per_doc": 1 + i // 4} for i in range(2, 6)]
    ranker = Words()
    scored(ranker, values)
    assert [(len(r.documents), r.truncate, r.max_tokens_per_doc) for r in ranker.requests] == [
        (1, False, None),
        (1, False, None),
        (2, True, 1),
        (2, True, 2),
    ]


def test_rows_before_a_failure_have_their_answers() -> None:
    def broken() -> Iterator[Row]:
        yield from rows([{"query": "q", "document": "a"}, {"query": "q", "document": "b"}])
        raise InputError("the disk is gone")

    stream = answers(Words(), broken(), Notes(print).add)
    assert len(next(stream).rows) == 2
    with pytest.raises(InputError, match="the disk is gone"):
        next(stream)


def test_the_first_bad_row_ends_a_batch_that_stops_at_bad_ones() -> None:
    good = {"query": "q", "documents": ["a"]}
    numbers: list[int] = []

    def source() -> Iterator[Row]:
        for row in rows([good, {}, good]):
            numbers.append(row.number)
            yield row

    results = list(answers(Words(), source(), Notes(print).add, stop_at_bad=True))
    assert [answer.rows[0].number for answer in results] == [1, 2]
    assert numbers == [1, 2]


def test_each_warning_is_noted_once_with_its_first_place() -> None:
    lines: list[str] = []
    values = [{"query": "q", "document": "d"}] * 3 + [{"query": "q", "documents": ["d"], "topk": 1}] * 2
    list(answers(Words(), rows(values, top_k=2), Notes(lines.append).add))
    assert lines == [
        "line 1: --top-k has no effect on a row with document: its result is one score",
        "line 4: topk is not read; did you mean top_k?",
    ]


def test_a_summary_has_a_line_for_each_kind_of_loss() -> None:
    assert Totals(1, 0, 2).speed(4.0) == "1 row, 2 documents in 4.0 s (0 documents/s)"
    assert list(Totals(1, 0, 2).losses("x")) == []
    totals = Totals(2001, 1, 9000, 1, 2)
    assert totals.speed(0.5, "line") == "2001 lines, 9000 documents in 0.5 s (18,000 documents/s)"
    assert list(totals.losses("bad.jsonl", "line", "http://h")) == [
        "1 bad line was skipped; see bad.jsonl",
        "1 document did not fit and was truncated (the service's MAX_SEQ_LENGTH)",
        "2 queries did not fit and were truncated (the service's MAX_SEQ_LENGTH)",
    ]
