"""Relevance judgements and candidates, as TREC, BEIR, MTEB and pandas write them."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from pathlib import Path
from typing import Any

from reranker.errors import InputError
from reranker.rows.columns import DOCUMENT_NAMES, GRADE_NAMES, QUERY_NAMES, find, read_id, require_once
from reranker.rows.forms import structured_kind
from reranker.rows.inputs import open_input, values
from reranker.rows.lines import writing
from reranker.terminal import name_list, note, plural

Grades = dict[str, dict[str, int]]
"""query id -> document id -> relevance; 0 is not relevant"""
Ranking = dict[str, dict[str, float]]
"""query id -> document id -> score, best first"""

_RUN = "query, Q0, document, rank, score, name"


def read_grades(path: Path, encoding: str | None) -> Grades:
    """Return the relevance judgements; of two for the same document the last one counts.

    The file is CSV, TSV, JSON or Parquet with columns for query, document and score; else it has TREC's four columns.

    Raises:
        InputError: a line has other columns, or there is none.
    """
    grades: Grades = {}
    changed = 0
    for where, *cells in _judgements(path, encoding):
        query, document, grade = read_id(cells[0]), read_id(cells[1]), _number(cells[2])
        if not query or not document:
            raise InputError(f"{where} has no id of a query or of a document")
        if grade is None or not grade.is_integer():
            raise InputError(f"{where}: relevance {cells[2]!r} is not a whole number")
        judged = grades.setdefault(query, {})
        changed += judged.get(document, grade) != grade
        judged[document] = int(grade)
    if not grades:
        raise InputError(f"{path} holds no judgements")
    if irrelevant := sum(max(judged.values()) < 1 for judged in grades.values()):
        note(
            f"{path} judges no document relevant (1 or more) for {irrelevant} of "
            f"{plural(len(grades), 'query', 'queries')}; every measure of such a query is 0"
        )
    if changed:
        note(f"{path} judges {plural(changed, 'document')} twice with another relevance; the last one counts")
    return grades


def read_run(path: Path, encoding: str | None, queries: Container[str]) -> Ranking:
    """Return the ranking of a TREC run, of these queries: by score as trec_eval reads it, ties in the file's order.

    Raises:
        InputError: a line has other columns.
    """
    if structured_kind(str(path)) not in (None, "tsv"):
        raise InputError(f"{path}: a run is read as TREC writes it, lines of {_RUN}")
    scores: dict[str, dict[str, float]] = {}
    not_judged: dict[str, None] = {}
    for where, cells in _cells(path, encoding):
        _require_cells(cells, 6, _RUN, where)
        query, document, score = read_id(cells[0]), read_id(cells[2]), _number(cells[4])
        if query not in queries:
            not_judged[query] = None
            continue
        if document in scores.setdefault(query, {}):
            raise InputError(f"{where}: {document} is there twice for query {query}")
        if score is None:
            raise InputError(f"{where}: score {cells[4]!r} is not a number")
        scores[query][document] = score
    if not_judged and scores:
        first = next(iter(not_judged))
        note(f"{path} ranks queries that are not judged: {len(not_judged)}, the first is {first!r}; they are left out")
    return {query: dict(sorted(found.items(), key=lambda item: -item[1])) for query, found in scores.items()}


def write_run(path: Path, ranking: Ranking, tag: str) -> None:
    """Write a TREC run with the model's scores, exact to the last digit; see `writing` for errors.

    The last column is `tag`, with an underscore for each blank.
    """
    tag = "_".join(tag.split())
    with writing(path), open(path, "w", encoding="utf-8") as file:
        for query, found in ranking.items():
            for place, (document, score) in enumerate(found.items(), 1):
                file.write(f"{query} Q0 {document} {place} {score!r} {tag}\n")


def _judgements(path: Path, encoding: str | None) -> Iterator[tuple[str, Any, Any, Any]]:
    """Yield place, query, document and grade."""
    kind = structured_kind(str(path))
    if kind in ("jsonl", "json", "parquet"):
        yield from _objects(path, kind, encoding)
        return
    heading: list[str] = []
    places: Sequence[int] = ()
    for where, cells in _cells(path, encoding):
        if not places and _number(cells[-1]) is None and find(cells, (*QUERY_NAMES, *DOCUMENT_NAMES, *GRADE_NAMES)):
            heading, places = cells, [cells.index(name) for name in _columns(cells, where)]
            continue
        places = places or ((0, 1, 2) if kind and len(cells) == 3 else (0, 2, 3))
        form = name_list(heading) or "query, 0, document, relevance"
        _require_cells(cells, len(heading) or places[-1] + 1, form, where)
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
    """Yield the cells of each line: of CSV and TSV by their delimiters, of other files by blanks."""
    kind = structured_kind(str(path))
    with open_input(str(path), kind or "lines", encoding) as source:
        if kind:
            for line, row in source.rows():
                if cells := row if len(row) > 1 else row[0].split():
                    yield f"{path} line {line}", cells
        else:
            for where, text in values(source):
                yield where, text.split()


def _columns(columns: Sequence[str], where: str) -> tuple[str, str, str]:
    """Return the columns of query, document and grade, each of which must be there once."""
    query, document, grade = (find(columns, names) for names in (QUERY_NAMES, DOCUMENT_NAMES, GRADE_NAMES))
    if query is None or document is None or grade is None:
        raise InputError(
            f"{where} has the columns {name_list(columns)}, not query-id, corpus-id and score: rename them"
        )
    require_once(columns, (query, document, grade), where)
    return query, document, grade


def _require_cells(cells: Sequence[str], count: int, form: str, where: str) -> None:
    if len(cells) != count:
        raise InputError(f"{where} has {plural(len(cells), 'column')}, not {count}: {form}")


def _number(value: object) -> float | None:
    """Return a finite number, or the number of a text; else None."""
    try:
        number = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
