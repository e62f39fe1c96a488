"""Groups of rows that become one request: neighbouring pairs of one query share its prefix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from reranker.rows.row import Row
from reranker.types import RerankRequest

_MAX_PAIRS = 256
_MAX_CHARACTERS = 10_000
"""A pair with a longer document stays alone: sharing the query saves it little, and its errors are its own."""


def groups(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Yield neighbouring pairs of one query together, every other row alone."""
    group: list[Row] = []
    for row in rows:
        if group and (len(group) == _MAX_PAIRS or _shared(row) != _shared(group[0])):
            yield group
            group = []
        group.append(row)
        if _shared(row) is None:
            yield group
            group = []
    if group:
        yield group


def request_of(group: Sequence[Row]) -> RerankRequest | None:
    """Return the request of a group; None for a row without one."""
    request = group[0].request
    if request is None or len(group) == 1:
        return request
    return replace(request, documents=[text for row in group if row.request for text in row.request.documents])


def _shared(row: Row) -> RerankRequest | None:
    """Return the part of a request that pairs of one group have in common; None for a row that stays alone.

    A pair whose document may not be truncated stays alone, because its error would fail the other pairs.
    """
    request = row.request if row.pair else None
    if request is None or not request.truncate or len(request.documents[0]) > _MAX_CHARACTERS:
        return None
    return replace(request, documents=())
