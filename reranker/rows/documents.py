"""The documents to rank, from a file or standard input in any form of `reranker.rows.inputs`."""

from __future__ import annotations

import sys
from typing import Any

from reranker.errors import InputError
from reranker.request.fields import json_kind
from reranker.rows.forms import TEXT_NAMES
from reranker.rows.inputs import Input, open_input, values
from reranker.rows.tables import text_column
from reranker.terminal import name_list, note

_LISTS = ("documents", "texts")
"""Fields of a request, which is no document."""
_HARMLESS = ("_id", "id", "meta", "metadata")
"""Keys beside a text that nobody expects to be ranked."""
_MAX_KEYS = 20
"""Keys that are not read, of which a note says so."""


def read(path: str, kind: str | None, field: str | None, encoding: str | None) -> list[str]:
    """All documents of a file (`-`: standard input); a note on standard error says which column they are.

    Args:
        path: the file's name.
        kind: one of `reranker.rows.forms.KINDS`; None: by the file's name.
        field: the key or column that holds the text; None: the one with a known name.
        encoding: None: UTF-8.

    Raises:
        InputError: it cannot be read, or does not tell its documents; names the line.
    """
    if path == "-" and sys.stdin is not None and sys.stdin.isatty():
        raise InputError("no documents: give them as arguments, with --file, or through a pipe")
    with open_input(path, kind, encoding) as source:
        source.check_encoding()
        found = _documents(source, field)
    if not found:
        raise InputError(f"{source.name} holds no documents")
    return found


def _documents(source: Input, field: str | None) -> list[str]:
    found: list[str] = []
    key: str | None = None
    unread: dict[str, None] = {}
    for where, value in values(source):
        if isinstance(value, dict) and key is None:
            key = _key(source, value, field, where)
        text = value.get(key) if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise _no_text(value, key or field or "text", where)
        found.append(text)
        if isinstance(value, dict) and not source.columns and len(value) > 1 and len(unread) <= _MAX_KEYS:
            unread |= dict.fromkeys(k for k, v in value.items() if k not in (key, *_HARMLESS) and v is not None)
    _tell_unread(list(unread), source.name)
    if found and key is None and field is not None:
        raise InputError(f"--field {field} has no effect: {source.name} holds texts without columns or keys")
    return found


def _no_text(value: Any, key: str, where: str) -> InputError:
    """Say what a record holds in the place of a text."""
    if not isinstance(value, dict):
        holds, cure = f"it holds {json_kind(value)}", ""
    elif key in value:
        holds, cure = f'its "{key}" holds {json_kind(value[key])}', ""
    else:
        holds, cure = f'it has no "{key}"', "; name the key with --field"
    return InputError(f'{where} is neither a string nor an object with a string "{key}": {holds}{cure}')


def _tell_unread(keys: list[str], name: str) -> None:
    """Say which keys of objects are not ranked; columns of a table are in sight."""
    for key in keys[:_MAX_KEYS]:
        note(f"{name_list([key])!r} is not read in {name}")
    if len(keys) > _MAX_KEYS:
        note(f"more keys are not read in {name}; no more notes follow")


def _key(source: Input, first: dict[str, Any], field: str | None, where: str) -> str:
    """The column or key that holds the text of every record, by the first one."""
    if source.columns:
        only = source.columns[0]
        if len(source.columns) == 1 and field is None and only.casefold() not in TEXT_NAMES:
            raise InputError(
                f"{source.name} has one column, and its first line {name_list([only])!r} is no known heading: if it is "
                f"one, name it with --field; if it is a document, use --input-format lines"
            )
        key = text_column(source.columns, field, source.name)
    else:
        strings = [k for k in first if isinstance(first[k], str) and k.strip().casefold() in TEXT_NAMES]
        if field is None and not strings and (lists := [k for k in _LISTS if isinstance(first.get(k), list)]):
            raise InputError(
                f'{where} is a request with "{lists[0]}"; batch reads requests, rank reads documents: '
                f"give the list alone, or name the key of a text with --field"
            )
        key = text_column(strings if strings and field is None else list(first), field, where, "key")
    if field is None and key.casefold() != "text":
        note(f"the documents are {key!r} of {source.name}; choose another with --field")
    return key
