"""Rows of a table as the bodies that JSON would give: cells are texts, and a blank one is absent."""

from __future__ import annotations

import json
import math
from typing import Any

from reranker.errors import InputError
from reranker.rows.inputs import Input
from reranker.rows.row import COLUMNS
from reranker.rows.tables import demand_once, text_column
from reranker.terminal import name_list, note


class RowError(InputError):
    """One row cannot be used; the others can."""


class Cells:
    """Turns the rows of an input into bodies with `query` and `documents`, or `query` and `document`.

    Args:
        source: the input; JSON objects of it pass as they are, but for `field`.
        field: the column or key of the document; None: `documents`, `document`, or another known name of a column.
    """

    def __init__(self, source: Input, field: str | None) -> None:
        self.source = source
        self.field = field
        self.names: dict[str, str] | None = None
        """The name of each column in a body."""

    def body(self, value: Any) -> Any:
        """The body of a row.

        Raises:
            RowError: a cell cannot be read.
            InputError: the columns tell no query or no document.
        """
        if not isinstance(value, dict):
            return value
        if not self.source.columns:
            return self._renamed(value)
        if self.names is None:
            self.names = self._columns()
        cells = {self.names[column]: cell for column, cell in value.items() if column in self.names}
        return {name: _value(name, cell) for name, cell in cells.items() if not _absent(name, cell)}

    def _renamed(self, value: dict[str, Any]) -> dict[str, Any]:
        if self.field is None:
            return value
        if self.field not in value:
            raise RowError(f"{self.field}: is required, because --field names it")
        kept = {key: v for key, v in value.items() if key not in ("documents", "document", self.field)}
        return kept | {"document": value[self.field]}

    def _columns(self) -> dict[str, str]:
        columns, name = self.source.columns, self.source.name
        folded = {column.strip().casefold(): column for column in columns}
        if "query" not in folded:
            raise InputError(f"{name} has no column query; its columns are {name_list(columns)}: rename one")
        demand_once(columns, COLUMNS, name)
        names = {column: fold for fold, column in folded.items() if fold}  # pandas names its index ""
        if self.field is None and folded.keys() & {"documents", "document"}:
            return names
        column = text_column([c for c in columns if c != folded["query"]], self.field, name)
        if self.field is None:
            note(f"the documents are {column!r} of {name}; choose another with --field")
        return {c: n for c, n in names.items() if n not in ("documents", "document")} | {column: "document"}


def _absent(name: str, cell: Any) -> bool:
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
    if isinstance(cell, float) and cell.is_integer():  # pandas writes a whole number beside a missing one as a float
        return int(cell)
    return cell
