"""Rows of a batch and the requests that they become: neighbouring pairs of one query share one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from reranker.errors import InputError
from reranker.rows.row import pair_of, request_of
from reranker.types import RerankRequest

_DOCUMENTS = 256
"""Pairs that become one request at most."""
_CHARACTERS = 10_000
"""A longer document goes alone: sharing the query would save it little, and its errors are its own."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input."""

    number: int
    """Its line or row in the file, from 1."""
    id: Any = None
    request: RerankRequest | None = None
    top_k: int | None = None
    pair: bool = False
    """It has one `document`, and its result is one score."""
    error: str = ""
    """Why there is no request."""
    warnings: tuple[str, ...] = ()
    """Sentences about its fields that are not read."""
    place: str = ""
    """Where it is, for messages."""
    end: int = 0
    """How much of the input is read with it."""


def row_of(number: int, body: Any, top_k: int | None, instruction: str | None) -> Row:
    """The row that a JSON value makes.

    Args:
        number: see `Row`.
        body: an object with query and documents, or query and document.
        top_k: how many results, where the row does not say.
        instruction: where the row does not say.
    """
    name = body.get("id") if isinstance(body, dict) else None
    try:
        if isinstance(body, dict) and "document" in body and body.get("documents") is body.get("texts") is None:
            pair = pair_of(body, instruction)
            return Row(number, name, pair.request, pair=True, warnings=pair.warnings)
        row = request_of(body, top_k, instruction)
        return Row(number, name, row.request, row.top_k, warnings=row.warnings)
    except InputError as error:
        return Row(number, name, error=str(error))


def groups(found: Iterable[Row]) -> Iterator[list[Row]]:
    """Neighbouring pairs of one query together, so that they share its prefix; every other row alone."""
    kept: list[Row] = []
    for row in found:
        if kept and (len(kept) == _DOCUMENTS or _shared(row) != _shared(kept[0])):
            yield kept
            kept = []
        kept.append(row)
        if _shared(row) is None:
            yield kept
            kept = []
    if kept:
        yield kept


def joined(group: list[Row]) -> RerankRequest | None:
    """The request of a group; None for a row that has none."""
    request = group[0].request
    if request is None or len(group) == 1:
        return request
    return replace(request, documents=[text for row in group if row.request for text in row.request.documents])


def _shared(row: Row) -> RerankRequest | None:
    """The part of a request that neighbouring pairs must share to become one; None for every other row.

    A pair whose document may not be truncated stays alone, because its error would fail the pairs beside it.
    """
    request = row.request if row.pair else None
    if request is None or not request.truncate or len(request.documents[0]) > _CHARACTERS:
        return None
    return replace(request, documents=())
