"""The documents of `rank`, from a file or standard input in any form."""

from __future__ import annotations

import sys
from typing import Any

from reranker.errors import InputError
from reranker.notes import Notes
from reranker.request.fields import json_kind
from reranker.rows.columns import TEXT_NAMES, find_text, fold
from reranker.rows.inputs import Input, open_input, values
from reranker.terminal import name_list, note

_LISTS = ("documents", "texts")
"""Keys of the documents in a request."""
_METADATA = ("_id", "id", "meta", "metadata")
"""Keys that need no note if they are not read."""
MAX_KEY_NOTES = 20


def read(path: str, kind: str | None, field: str | None, encoding: str | None) -> list[str]:
    """Return all documents of a file, or of standard input for `-`; a note names the column of the text.

    `kind` is one of `reranker.rows.forms.KINDS`, None for the one of the name; `field` is the key or column of the
    text, None for a known name.

    Raises:
        InputError: it cannot be read, or has no recognizable documents; names the line.
    """
    if path == "-" and sys.stdin is not None and sys.stdin.isatty():
        raise InputError("no documents: give them as arguments, with --file, or through a pipe")
    with open_input(path, kind, encoding) as source:
        source.check_encoding()
        texts = _texts(source, field)
    if not texts:
        raise InputError(f"{source.name} holds no documents")
    return texts


def _texts(source: Input, field: str | None) -> list[str]:
    texts: list[str] = []
    key: str | None = None
    seen: set[str] = set()
    notes = Notes(note, MAX_KEY_NOTES)
    for where, value in values(source):
        text = value
        if isinstance(value, dict):
            if key is None:
                key = _key(source, value, field, where)
                seen = {key, *_METADATA, *source.columns}  # the columns of a table are visible in its heading
            text = value.get(key)
            unread = [name for name, item in value.items() if name not in seen and item is not None]
            seen.update(unread)
            notes.add(f"{name_list([name])!r} is not read in {source.name}" for name in unread)
        if not isinstance(text, str):
            raise _no_text(value, key or field or "text", where)
        texts.append(text)
    if texts and key is None and field is not None:
        raise InputError(f"--field {field} has no effect: {source.name} holds texts without columns or keys")
    return texts


def _no_text(value: Any, key: str, where: str) -> InputError:
    if not isinstance(value, dict):
        problem = f"it holds {json_kind(value)}"
    elif key in value:
        problem = f'its "{key}" holds {json_kind(value[key])}'
    else:
        problem = f'it has no "{key}"; name the key with --field'
    return InputError(f'{where} is neither a string nor an object with a string "{key}": {problem}')


def _key(source: Input, first: dict[str, Any], field: str | None, where: str) -> str:
    """Return the column or key of the text in every record, by the first one."""
    columns = source.columns
    if columns:
        if field is None and len(columns) == 1 and columns[0].casefold() not in TEXT_NAMES:
            raise InputError(
                f"{source.name} has one column, and its first line {name_list(columns)!r} is no known heading: if it "
                f"is one, name it with --field; if it is a document, use --input-format lines"
            )
        key = find_text(columns, field, source.name)
    else:
        strings = [name for name in first if isinstance(first[name], str) and fold(name) in TEXT_NAMES]
        lists = [name for name in _LISTS if isinstance(first.get(name), list)]
        if field is None and lists and not strings:
            raise InputError(
                f'{where} is a request with "{lists[0]}"; batch reads requests, rank reads documents: '
                f"give the list alone, or name the key of a text with --field"
            )
        key = find_text(strings if strings and field is None else list(first), field, where, "key")
    if field is None and key.casefold() != "text":
        note(f"the documents are {key!r} of {source.name}; choose another with --field")
    return key
