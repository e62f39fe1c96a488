"""The texts of the user's own test data, as BEIR, MTEB and pandas lay them out."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from reranker.errors import InputError
from reranker.request.fields import json_kind
from reranker.rows.forms import TEXT_NAMES, told
from reranker.rows.ids import ID, column, read_id
from reranker.rows.inputs import Input, open_input, values
from reranker.rows.tables import demand_once, read_tsv, text_column
from reranker.terminal import name_list, note, plural

_ENDS = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Paths:
    """Where the parts are."""

    corpus: Path
    queries: Path
    qrels: Path


def beir(folder: str, split: str) -> Paths:
    """The parts of a BEIR folder; where one is there in several forms, the first of `_ENDS`.

    Raises:
        InputError: one is missing; says which splits there are.
    """
    root = Path(folder)
    qrels = _part(root / "qrels", split)
    if qrels is None:
        splits = sorted({p.name.partition(".")[0] for p in (root / "qrels").glob("*") if told(p.name)})
        there = f"; there: {', '.join(splits)}, choose with --split" if splits else "; is it a BEIR folder?"
        raise InputError(f"{root / 'qrels' / split}.tsv does not exist{there}")
    corpus, queries = (_part(root, name) or root / f"{name}.jsonl" for name in ("corpus", "queries"))
    return Paths(corpus, queries, qrels)


def _part(folder: Path, stem: str) -> Path | None:
    names = (f"{stem}{end}{packed}" for end in _ENDS for packed in ("", ".gz"))
    found = [name for name in names if (folder / name).is_file()]
    if len(found) > 1:
        note(f"{folder} holds {name_list(found)}; {found[0]} is read, the others are not")
    return folder / found[0] if found else None


def read_texts(path: Path, kind: str | None, encoding: str | None, wanted: Container[str] | None) -> dict[str, str]:
    """id -> text of a corpus or of queries, title and text joined.

    Args:
        path: JSON or a table with an id and a text, or lines of id, tab, text.
        kind: the form where the name does not tell it.
        encoding: None: UTF-8.
        wanted: ids to keep; None: all. A corpus of millions fits into memory when only its candidates are kept.

    Raises:
        InputError: a line has no id or no text, or an id has two texts.
    """
    kept: dict[str, str] = {}
    where = ""
    with open_input(str(path), told(str(path)) or kind, encoding) as source:
        for where, value, text in _rows(source):
            name = read_id(value)
            if not name or not isinstance(text, str):
                holds = "" if isinstance(text, str) else f"; its text is {json_kind(text)}"
                raise InputError(f'{where} needs "_id" and a string "text"{holds}')
            if (wanted is None or name in wanted) and kept.setdefault(name, text) != text:
                raise InputError(f"{where}: the id {name!r} is there twice, with another text")
    if not where:
        raise InputError(f"{path} is empty: it holds no texts")
    return kept


def _rows(source: Input) -> Iterator[tuple[str, Any, Any]]:
    """Where, id and text."""
    if source.form.kind == "lines":
        for where, line in values(source):
            yield _split(line, where)
    elif source.form.kind == "tsv":
        yield from _tsv(source)
    else:
        yield from _objects(source)


def _tsv(source: Input) -> Iterator[tuple[str, Any, Any]]:
    """With a heading, a table; without one, lines of id, tab, text in which a quote is a character like others."""
    lines = source.texts()
    first = next(lines, (0, ""))
    heading = [cell.strip() for cell in first[1].split("\t")]
    if column(heading, ID) or column(heading, TEXT_NAMES):
        keys = _Keys.of(heading, source.name)
        rows = read_tsv(chain([first], lines), source.name)
        next(rows)
        for number, cells in rows:
            where = f"{source.name} line {number}"
            if len(cells) != len(heading):
                raise InputError(
                    f"{where} has {plural(len(cells), 'column')}, not {len(heading)}: {name_list(heading)}"
                )
            yield where, *keys.values(dict(zip(heading, cells, strict=True)))
        return
    for number, line in chain([first], lines):
        if line.strip():
            yield _split(line.rstrip("\r\n"), f"{source.name} line {number}")


def _split(line: str, where: str) -> tuple[str, str, str]:
    name, tab, text = line.partition("\t")
    if not tab:
        raise InputError(f"{where} needs an id, a tab and a text")
    return where, name, text


def _objects(source: Input) -> Iterator[tuple[str, Any, Any]]:
    keys: _Keys | None = None
    for where, value in values(source):
        if not isinstance(value, dict):
            raise InputError(f'{where} needs "_id" and a string "text"')
        keys = keys or _Keys.of(source.columns or [k for k in value if not isinstance(value[k], list)], source.name)
        yield where, *keys.values(value)


@dataclass(frozen=True, slots=True)
class _Keys:
    """The columns of a file of texts."""

    id: str
    text: str
    title: str | None

    @classmethod
    def of(cls, columns: list[str], name: str) -> _Keys:
        """Find them.

        Raises:
            InputError: one cannot be told.
        """
        found = column(columns, ID)
        if found is None:
            raise InputError(f"{name} has no column for the id; its columns are {name_list(columns)}: name one _id")
        others = [c for c in columns if c != found]
        text = column(others, ("text", "query", "question")) or text_column(others, None, name, cure="name one text")
        if text.casefold() != "text":
            note(f"the texts are {text!r} of {name}")
        title = column(others, ("title",))
        demand_once(columns, filter(None, (found, text, title)), name)
        return cls(found, text, title)

    def values(self, row: dict[str, Any]) -> tuple[Any, Any]:
        """Id and text of a row."""
        text, title = row.get(self.text), row.get(self.title or "")
        return row.get(self.id), f"{title} {text}" if isinstance(title, str) and title and isinstance(
            text, str
        ) else text
