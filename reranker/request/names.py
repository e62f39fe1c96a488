"""Other names for the fields: a dialect maps its body to the common one, and its client reads its own names in reports.

Errors and warnings begin with the name of a field or have it after "did you mean", so those two places are translated.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from typing import Any

from reranker.errors import InvalidRequestError
from reranker.request.parse import ParsedRequest, parse_request
from reranker.request.unread import MAX_NAMES

_NAME = re.compile(r"\A\w+|(?<=did you mean )\w+")


def renamed(text: str, names: Mapping[str, str]) -> str:
    """Return a sentence about a field with the client's name of it; `names` has the client's name of each field."""
    return _NAME.sub(lambda match: names.get(match[0], match[0]), text)


@contextmanager
def naming(names: Mapping[str, str]) -> Iterator[None]:
    """Raise errors about fields with the client's names."""
    try:
        yield
    except InvalidRequestError as error:
        raise InvalidRequestError(renamed(str(error), names)) from None


def parse_as(
    names: Mapping[str, str], body: Mapping[str, Any], unread: Mapping[str, str], *, max_documents: int | None = None
) -> ParsedRequest:
    """Parse a body that was mapped to the common one.

    Args:
        names: the client's name of each field that it calls differently.
        body: with the common names.
        unread: names of the client's body that are not in `body`, and a warning for each.
        max_documents: see `parse_request`.
    """
    with naming(names):
        parsed = parse_request(body, max_documents=max_documents)
    more = dict(islice(unread.items(), max(0, MAX_NAMES - len(parsed.ignored))))
    return replace(
        parsed,
        names=names,
        ignored=(*(renamed(name, names) for name in parsed.ignored), *more),
        warnings=(*(renamed(text, names) for text in parsed.warnings), *more.values()),
    )
