"""The documents to rank, from a file or standard input: one per line, JSON by line, or CSV."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reranker.cli.errors import InputError
from reranker.cli.lines import opened, parse, texts

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv"}
"""By the end of a file's name; everything else is one document per line."""


def read(path: str, kind: str | None, field: str) -> list[str]:
    """All documents of a file (`-`: standard input), blank lines left out.

    Args:
        kind: lines, jsonl or csv; None: by the file's name.
        field: the key or column that holds the text.

    Raises:
        InputError: it cannot be read; names the line.
    """
    name = "standard input" if path == "-" else path
    if path == "-" and sys.stdin.isatty():
        raise InputError("no documents: give them as arguments, with --file, or through a pipe")
    kind = kind or FORMATS.get(Path(path).suffix.lower(), "lines")
    with opened(path) as file:
        lines = texts(file, name)
        if kind == "csv":
            found = list(_csv(lines, name, field))
        elif kind == "jsonl":
            found = [_document(parse(line, f"{name} line {n}"), f"{name} line {n}", field) for n, line in lines]
        else:
            found = [line for _, line in lines]
    if not found:
        raise InputError(f"{name} holds no documents")
    return found


def _document(value: Any, where: str, field: str) -> str:
    found = value.get(field) if isinstance(value, dict) else value
    if not isinstance(found, str):
        raise InputError(
            f'{where} is neither a string nor an object with a string "{field}"; name the key with --field'
        )
    return found


def _csv(lines: Iterator[tuple[int, str]], name: str, field: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)
    rows = csv.DictReader((line + "\n" for _, line in lines), strict=True)
    try:
        columns = list(rows.fieldnames or [])
        if field not in columns:
            raise InputError(f"{name} has no column {field!r} but {', '.join(columns)}; name one with --field")
        for row in rows:
            if row[field] is None:
                raise InputError(f"{name} line {rows.line_num} has too few columns")
            yield row[field]
    except csv.Error as error:
        raise InputError(f"{name} line {rows.line_num} is not CSV: {error}") from None
