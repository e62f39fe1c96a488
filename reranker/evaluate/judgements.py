"""Relevance judgements and candidates, as TREC, BEIR, MTEB and pandas write them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from reranker.errors import InputError
from reranker.rows import ids
from reranker.rows.forms import told
from reranker.rows.ids import read_id
from reranker.rows.inputs import open_input, values
from reranker.rows.lines import writing
from reranker.rows.tables import demand_once
from reranker.terminal import name_list, note, plural

Grades = dict[str, dict[str, int]]
"""query id -> document id -> relevance; 0 is not relevant"""
Ranking = dict[str, list[str]]
"""query id -> document ids, best first"""

_RUN = "query, Q0, document, rank, score, name"


def read_grades(path: Path, encoding: str | None) -> Grades:
    """The relevance judgements; of two for the same document the last one counts.

    Args:
        path: CSV, TSV, JSON or Parquet with columns for query, document and score; else TREC's four columns.
        encoding: None: UTF-8.

    Raises:
        InputError: a line has other columns, or there is none.
    """
    grades: Grades = {}
    changed = 0
    for where, query, document, value in _judgements(path, encoding):
        names, grade = (read_id(query), read_id(document)), _number(value)
        if not all(names):
            raise InputError(f"{where} has no id of a query or of a document")
        if grade is None or not grade.is_integer():
            raise InputError(f"{where}: relevance {value!r} is not a whole number")
        found = grades.setdefault(names[0], {})
        changed += found.get(names[1], grade) != grade
        found[names[1]] = int(grade)
    if not grades:
        raise InputError(f"{path} holds no judgements")
    idle = sum(max(found.values()) < 1 for found in grades.values())
    if idle:
        note(
            f"{path} judges no document relevant (1 or more) for {idle} of {plural(len(grades), 'query', 'queries')}; "
            f"every measure of such a query is 0"
        )
    if changed:
        note(f"{path} judges {plural(changed, 'document')} twice with another relevance; the last one counts")
    return grades


def read_run(path: Path, encoding: str | None, queries: Container[str]) -> Ranking:
    """The ranking of a TREC run file, of these queries: by score as trec_eval reads it, ties in the file's order.

    Raises:
        InputError: a line has other columns.
    """
    if told(str(path)) not in (None, "tsv"):
        raise InputError(f"{path}: a run is read as TREC writes it, lines of {_RUN}")
    scored: dict[str, dict[str, float]] = {}
    strangers: dict[str, None] = {}
    for where, cells in _cells(path, encoding):
        _demand(cells, 6, _RUN, where)
        query, document, score = read_id(cells[0]), read_id(cells[2]), _number(cells[4])
        if query not in queries:
            strangers[query] = None
            continue
        if document in scored.setdefault(query, {}):
            raise InputError(f"{where}: {document} is there twice for query {query}")
        if score is None:
            raise InputError(f"{where}: score {cells[4]!r} is not a number")
        scored[query][document] = score
    if strangers and scored:
        first = next(iter(strangers))
        note(f"{path} ranks queries that are not judged: {len(strangers)}, the first is {first!r}; they are left out")
    return {query: sorted(found, key=lambda d: -found[d]) for query, found in scored.items()}


def write_run(path: Path, ranking: Ranking) -> None:
    """Write a TREC run.

    Raises:
        FailedError: it cannot be written.
    """
    with writing(path), open(path, "w", encoding="utf-8") as file:
        for query, documents in ranking.items():
            for i, document in enumerate(documents):
                file.write(f"{query} Q0 {document} {i + 1} {len(documents) - i} reranked\n")


def _judgements(path: Path, encoding: str | None) -> Iterator[tuple[str, Any, Any, Any]]:
    """Where, query, document and grade."""
    kind = told(str(path))
    if kind in ("jsonl", "json", "parquet"):
        yield from _objects(path, kind, encoding)
        return
    heading: list[str] = []
    places: Sequence[int] = ()
    for where, cells in _cells(path, encoding):
        if not places and _number(cells[-1]) is None and ids.column(cells, (*ids.QUERY, *ids.DOCUMENT, *ids.GRADE)):
            heading, places = cells, [cells.index(name) for name in _columns(cells, where)]
            continue
        places = places or ((0, 1, 2) if kind and len(cells) == 3 else (0, 2, 3))
        form = name_list(heading) or "query, 0, document, relevance"
        _demand(cells, len(heading) or places[-1] + 1, form, where)
        query, document, grade = (cells[place] for place in places)
        yield where, query, document, grade


def _objects(path: Path, kind: str, encoding: str | None) -> Iterator[tuple[str, Any, Any, Any]]:
    names: Sequence[str] = ()
    with open_input(str(path), kind, encoding) as source:
        for where, value in values(source):
            if not isinstance(value, dict):
                raise InputError(f"{where} is not an object with query-id, corpus-id and score")
            names = names or _columns(list(value), where)
            query, document, grade = (value.get(name) for name in names)
            yield where, query, document, grade


def _cells(path: Path, encoding: str | None) -> Iterator[tuple[str, list[str]]]:
    """The cells of each line: of CSV and TSV by their delimiters, of all else by blanks."""
    kind = told(str(path))
    with open_input(str(path), kind or "lines", encoding) as source:
        if kind:
            for line, row in source.rows():
                if cells := row if len(row) > 1 else row[0].split():
                    yield f"{path} line {line}", cells
        else:
            for where, text in values(source):
                yield where, text.split()


def _columns(columns: Sequence[str], where: str) -> tuple[str, str, str]:
    """The columns of query, document and grade.

    Raises:
        InputError: one cannot be told.
    """
    found = [ids.column(columns, names) for names in (ids.QUERY, ids.DOCUMENT, ids.GRADE)]
    query, document, grade = found
    if query is None or document is None or grade is None:
        raise InputError(
            f"{where} has the columns {name_list(columns)}, not query-id, corpus-id and score: rename them"
        )
    demand_once(columns, (query, document, grade), where)
    return query, document, grade


def _demand(cells: Sequence[str], count: int, form: str, where: str) -> None:
    if len(cells) != count:
        raise InputError(f"{where} has {plural(len(cells), 'column')}, not {count}: {form}")


def _number(value: object) -> float | None:
    """A finite number, or a text that is one; else None."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
