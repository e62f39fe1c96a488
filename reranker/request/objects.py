"""JSON objects with every name once."""

from __future__ import annotations

from typing import Any

from reranker.errors import InvalidRequestError
from reranker.request.unread import token


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, as an `object_pairs_hook` of `json`. It costs 1 us per object.

    Raises:
        InvalidRequestError: a name is in it twice, of which two parsers could read two values.
    """
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        doubled = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        rule = "is in one JSON object twice; send it once"
        raise InvalidRequestError(f"{token(doubled)}: {rule}", logged=f"a name {rule}")
    return value
