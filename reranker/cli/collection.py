"""The user's own test data, as BEIR and TREC lay it out: texts of queries and documents, and what is relevant."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from reranker.cli.errors import InputError
from reranker.cli.lines import opened, parse, texts

Grades = dict[str, dict[str, int]]
"""query id -> document id -> relevance; 0 is not relevant"""
Ranking = dict[str, list[str]]
"""query id -> document ids, best first"""


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the parts are."""

    corpus: Path
    queries: Path
    qrels: Path
    beir: bool
    """The qrels have BEIR's three columns, not TREC's four."""


def beir(folder: str, split: str) -> Paths:
    """The parts of a BEIR folder.

    Raises:
        InputError: one is missing; says which splits there are.
    """
    root = Path(folder)
    paths = Paths(root / "corpus.jsonl", root / "queries.jsonl", root / "qrels" / f"{split}.tsv", beir=True)
    if not paths.qrels.is_file():
        splits = ", ".join(sorted(p.stem for p in (root / "qrels").glob("*.tsv")))
        there = f"; there: {splits}, choose with --split" if splits else "; is it a BEIR folder?"
        raise InputError(f"{paths.qrels} does not exist{there}")
    return paths


def read_grades(paths: Paths) -> Grades:
    """The relevance judgements.

    Raises:
        InputError: a line has other columns, or there is none.
    """
    grades: Grades = {}
    form = "query, document, relevance" if paths.beir else "query, 0, document, relevance"
    for number, columns in _columns(paths.qrels, 3 if paths.beir else 4, form):
        query, document, grade = columns[0], columns[-2], columns[-1]
        if number == 1 and grade == "score":  # BEIR's head line
            continue
        try:
            grades.setdefault(query, {})[document] = int(grade)
        except ValueError:
            raise InputError(f"{paths.qrels} line {number}: relevance {grade!r} is not a whole number") from None
    if not grades:
        raise InputError(f"{paths.qrels} holds no judgements")
    return grades


def read_run(path: Path, queries: Container[str]) -> Ranking:
    """The ranking of a TREC run file, of these queries: by score as trec_eval reads it, ties in the file's order.

    Raises:
        InputError: a line has other columns.
    """
    scored: dict[str, dict[str, float]] = {}
    for number, columns in _columns(path, 6, "query, Q0, document, rank, score, name"):
        query, document, score = columns[0], columns[2], columns[4]
        if query not in queries:
            continue
        if document in scored.setdefault(query, {}):
            raise InputError(f"{path} line {number}: {document} is there twice for query {query}")
        try:
            scored[query][document] = float(score)
        except ValueError:
            raise InputError(f"{path} line {number}: score {score!r} is not a number") from None
    return {query: sorted(found, key=lambda d: -found[d]) for query, found in scored.items()}


def read_texts(path: Path, wanted: Container[str] | None = None) -> dict[str, str]:
    """id -> text of a corpus or of queries: BEIR's JSON lines (title and text joined), else lines of id, tab, text.

    Args:
        wanted: ids to keep; None: all. A corpus of millions fits into memory when only its candidates are kept.

    Raises:
        InputError: a line has no id or no text.
    """
    kept: dict[str, str] = {}
    rows = _jsonl(path) if path.suffix.lower() in (".jsonl", ".ndjson") else _tsv(path)
    for name, text in rows:
        if wanted is None or name in wanted:
            kept[name] = text
    return kept


def _jsonl(path: Path) -> Iterator[tuple[str, str]]:
    with opened(path) as file:
        for number, line in texts(file, path):
            where = f"{path} line {number}"
            value = parse(line, where)
            name = value.get("_id", value.get("id")) if isinstance(value, dict) else None
            if not isinstance(name, str | int) or not isinstance(value.get("text"), str):
                raise InputError(f'{where} needs "_id" and a string "text"')
            title = value.get("title")
            yield str(name), f"{title} {value['text']}" if isinstance(title, str) and title else value["text"]


def _tsv(path: Path) -> Iterator[tuple[str, str]]:
    with opened(path) as file:
        for number, line in texts(file, path):
            name, tab, text = line.partition("\t")
            if not tab:
                raise InputError(f"{path} line {number} needs an id, a tab and a text")
            yield name, text


def _columns(path: Path, count: int, form: str) -> Iterator[tuple[int, list[str]]]:
    with opened(path) as file:
        for number, line in texts(file, path):
            columns = line.split()
            if len(columns) != count:
                raise InputError(f"{path} line {number} has {len(columns)} columns, not {count}: {form}")
            yield number, columns
