"""The entries of ACCESS_TOKEN: `token`, or `name=token` with the name of its caller for the log and the metrics.

A token may contain `=` itself, and older settings have no names. So that no client is locked out, an entry with a name
is accepted as a whole too, and an entry that may be either is refused at the start.
"""

from __future__ import annotations

import re
from typing import NamedTuple

UNNAMED = "unnamed"
"""The caller of a token without a name; written before a token, it says that the token has none."""
NONE = "none"
"""The caller of a request without an accepted token."""
MAX_NAMES = 64
"""The files of the metrics have space for so many."""
MIN_NAMED_TOKEN = 16
"""Characters of a token after a name: an older token that is read as a name and a token must stay hard to guess."""

_NAMED = re.compile(rf"([a-z][a-z0-9_-]{{0,31}})=([^=].{{{MIN_NAMED_TOKEN - 1},}})")
_UNNAMED = re.compile(rf"({UNNAMED})=(.+)")
_PERHAPS_NAMED = re.compile(r"[\w.-]+=+[^=].*", re.ASCII)  # `=` at the end alone is the padding of base64


class Entry(NamedTuple):
    """A token of ACCESS_TOKEN."""

    caller: str
    accepted: tuple[str, ...]
    """The texts that a client may send: the token, and the whole entry if it has a name."""


def entries(text: str) -> list[Entry]:
    """Return the entries of ACCESS_TOKEN, which commas separate; blank ones do not count.

    Raises:
        ValueError: an entry is ambiguous, a token has two callers, or there are too many names. No text of an entry is
            in the message.
    """
    found: list[Entry] = []
    callers: dict[str, str] = {}
    for number, entry in enumerate(map(str.strip, text.split(",")), 1):
        if not entry:
            continue
        found.append(_read(entry, number))
        for accepted in found[-1].accepted:
            if callers.setdefault(accepted, found[-1].caller) != found[-1].caller:
                raise ValueError(f"entry {number} repeats the token of another caller: give each caller its own")
    if len(set(callers.values()) - {UNNAMED}) > MAX_NAMES:
        raise ValueError(f"there are more than {MAX_NAMES} names: several tokens may have the same name")
    return found


def _read(entry: str, number: int) -> Entry:
    match = _UNNAMED.fullmatch(entry) or _NAMED.fullmatch(entry)
    if match and match[1] != NONE and match[2].strip("="):
        return Entry(match[1], (match[2], entry))
    if _PERHAPS_NAMED.fullmatch(entry):
        raise ValueError(
            f"entry {number} may be name=token or a token with = in it: a name is a-z, then at most 31 of a-z, 0-9, - "
            f"and _, not {NONE}; its token has at least {MIN_NAMED_TOKEN} characters; before a token without a name "
            f"write {UNNAMED}="
        )
    return Entry(UNNAMED, (entry,))
