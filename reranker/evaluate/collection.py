"""The texts of the user's own test data, in the layouts of BEIR, MTEB and pandas."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reranker.errors import InputError
from reranker.request.fields import json_kind
from reranker.rows.columns import ID_NAMES, TEXT_NAMES, find, find_text, read_id, require_once
from reranker.rows.forms import structured_kind
from reranker.rows.inputs import Input, open_input, values
from reranker.terminal import name_list, note

_SUFFIXES = (".jsonl", ".ndjson", ".json", ".tsv", ".csv", ".parquet")


@dataclass(frozen=True, slots=True)
class Paths:
    """The files of a collection."""

    corpus: Path
    queries: Path
    qrels: Path


def beir(folder: str, split: str) -> Paths:
    """Return the files of a BEIR folder; of a part in several forms, the first of `_SUFFIXES`.

    Raises:
        InputError: one is missing; names the existing splits.
    """
    root = Path(folder)
    qrels = _part(root / "qrels", split)
    if qrels is None:
        splits = sorted({p.name.partition(".")[0] for p in (root / "qrels").glob("*") if structured_kind(p.name)})
        existing = f"; there: {', '.join(splits)}, choose with --split" if splits else "; is it a BEIR folder?"
        raise InputError(f"{root / 'qrels' / split}.tsv does not exist{existing}")
    corpus, queries = (_part(root, name) or root / f"{name}.jsonl" for name in ("corpus", "queries"))
    return Paths(corpus, queries, qrels)


def _part(folder: Path, stem: str) -> Path | None:
    names = [f"{stem}{suffix}{gz}" for suffix in _SUFFIXES for gz in ("", ".gz")]
    names = [name for name in names if (folder / name).is_file()]
    if len(names) > 1:
        note(f"{folder} holds {name_list(names)}; {names[0]} is read, the others are not")
    return folder / names[0] if names else None


def read_texts(path: Path, kind: str | None, encoding: str | None, wanted: Container[str] | None) -> dict[str, str]:
    """Return id -> text of a corpus or of queries, title and text joined.

    The file is JSON or a table with an id and a text, or lines of id, tab, text; `kind` is its form if the name does
    not tell it. `wanted` ids are kept, None for all: of a corpus of millions only the candidates fit into memory.

    Raises:
        InputError: a line has no id or no text, or an id has two texts.
    """
    texts: dict[str, str] = {}
    where = ""
    with open_input(str(path), structured_kind(str(path)) or kind, encoding) as source:
        for where, value, text in _rows(source):
            name = read_id(value)
            if not name or not isinstance(text, str):
                problem = "" if isinstance(text, str) else f"; its text is {json_kind(text)}"
                raise InputError(f'{where} needs "_id" and a string "text"{problem}')
            if (wanted is None or name in wanted) and texts.setdefault(name, text) != text:
                raise InputError(f"{where}: the id {name!r} is there twice, with another text")
    if not where:
        raise InputError(f"{path} is empty: it holds no texts")
    return texts


def _rows(source: Input) -> Iterator[tuple[str, Any, Any]]:
    """Yield place, id and text; TSV without a heading is lines of id, tab, text, and a quote is a plain character."""
    kind = source.form.kind
    heading = source.first_line().split("\t") if kind == "tsv" else []
    if kind == "lines" or (kind == "tsv" and not (find(heading, ID_NAMES) or find(heading, TEXT_NAMES))):
        for number, line in source.texts():
            if not line.strip():
                continue
            identifier, tab, rest = line.rstrip("\r\n").partition("\t")
            if not tab:
                raise InputError(f"{source.name} line {number} needs an id, a tab and a text")
            yield f"{source.name} line {number}", identifier, rest
        return
    keys: tuple[str, str, str] | None = None
    for where, value in values(source):
        if not isinstance(value, dict):
            raise InputError(f'{where} needs "_id" and a string "text"')
        keys = keys or _keys(source.columns or [k for k in value if not isinstance(value[k], list)], source.name)
        name, text, title = (value.get(key) for key in keys)
        if isinstance(title, str) and title and isinstance(text, str):
            text = f"{title} {text}"
        yield where, name, text


def _keys(columns: list[str], file: str) -> tuple[str, str, str]:
    """Return the columns of id, text and title; an empty name for no title."""
    name = find(columns, ID_NAMES)
    if name is None:
        raise InputError(f"{file} has no column for the id; its columns are {name_list(columns)}: name one _id")
    rest = [column for column in columns if column != name]
    text = find(rest, ("text", "query", "question")) or find_text(rest, None, file, fix="name one text")
    if text.casefold() != "text":
        note(f"the texts are {text!r} of {file}")
    title = find(rest, ("title",)) or ""
    require_once(columns, filter(None, (name, text, title)), file)
    return name, text, title
