"""Rows of a table as the bodies that JSON would give: cells are texts, and a blank cell is an absent value."""

from __future__ import annotations

import json
import math
from typing import Any

from reranker.errors import InputError
from reranker.rows.columns import find_text, fold, require_once
from reranker.rows.inputs import Input
from reranker.rows.row import COLUMNS
from reranker.terminal import name_list, note

_DOCUMENTS = ("documents", "document")


class RowError(InputError):
    """One row cannot be used; the others can."""


class Cells:
    """Turns the rows of an input into bodies with `query` and `documents`, or `query` and `document`.

    Args:
        source: the input; JSON objects pass unchanged, except for `field`.
        field: the column or key of the document; None: `documents`, `document`, or another known name of a column.
    """

    def __init__(self, source: Input, field: str | None) -> None:
        self.source = source
        self.field = field
        self._names: dict[str, str] = {}
        """Column -> its name in a body."""

    def body(self, value: Any) -> Any:
        """Return the body of a row.

        Raises:
            RowError: a cell cannot be read.
            InputError: no column is a query, or none a document.
        """
        if not isinstance(value, dict):
            return value
        if not self.source.columns:
            return self._renamed(value)
        self._names = self._names or self._columns()
        cells = {self._names[column]: cell for column, cell in value.items() if column in self._names}
        return {name: _value(name, cell) for name, cell in cells.items() if not _is_absent(name, cell)}

    def _renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        if self.field is None:
            return value
        if self.field not in value:
            raise RowError(f"{self.field}: is required, because --field names it")
        rest = {key: item for key, item in value.items() if key not in (*_DOCUMENTS, self.field)}
        return rest | {"document": value[self.field]}

    def _columns(self) -> dict[str, str]:
        columns, name = self.source.columns, self.source.name
        folded = {fold(column): column for column in columns}
        if "query" not in folded:
            raise InputError(f"{name} has no column query; its columns are {name_list(columns)}: rename one")
        require_once(columns, COLUMNS, name)
        names = {column: key for key, column in folded.items() if key}  # pandas gives its index an empty name
        if self.field is None and folded.keys() & set(_DOCUMENTS):
            return names
        text = find_text([column for column in columns if column != folded["query"]], self.field, name)
        if self.field is None:
            note(f"the documents are {text!r} of {name}; choose another with --field")
        return {column: key for column, key in names.items() if key not in _DOCUMENTS} | {text: "document"}


def _is_absent(name: str, cell: Any) -> bool:
    blank = cell == "" and name not in ("query", "document")
    return cell is None or blank or (isinstance(cell, float) and math.isnan(cell))


def _value(name: str, cell: Any) -> Any:
    if name in ("top_k", "top_n") and isinstance(cell, str) and cell.strip().isdecimal():
        return int(cell)
    if name == "documents" and isinstance(cell, str):
        try:
            return json.loads(cell)
        except (ValueError, RecursionError):
            raise RowError('documents: must be a JSON array such as ["a", "b"]; or name the column document') from None
    if isinstance(cell, float) and cell.is_integer():  # pandas turns integers into floats beside missing values
        return int(cell)
    return cell
