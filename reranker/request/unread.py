"""Names of fields that are not read: which are worth a report, what they may mean, and the report itself.

Names are those of a client, so each is shortened and cleaned before it may stand in a header, a log line or an error,
and their number is limited. Values are never reported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

MAX_NAMES = 10
"""Unread names that are reported of one request."""
MAX_SEEN = 100
"""Unread names that are kept of a body or of one document, which may hold a million."""
_MAX_NAME = 40
"""Characters of a reported name."""
_NO_TOKEN = re.compile(r"[^!#$%&'*+.^`|~\w-]", re.ASCII)

TEMPLATE_VALUES = "chat_template_kwargs"
"""Field in which clients of vLLM send the values of a chat template, an instruction among them."""

# Clients send these and do not depend on an effect. docs/clients.md says which client sends which.
_HARMLESS = frozenset(
    "user priority encoding_format request_id cache_salt model-id is_truncated overlap_tokens "
    "return_len kwargs property".split()
) | {TEMPLATE_VALUES}
_HARMLESS_KEYS = frozenset(("id", "meta", "metadata"))
"""The same for object documents."""

_SYNONYMS = {
    "query": "q question text text1 data1 search searchquery querytext searchtext input keyword keywords prompt "
    "sentence sourcesentence queries topic",
    "documents": "docs doc document passages passage text text2 data2 textlist contents content items sentences "
    "candidates corpus inputs input chunks results pairs nodes strings data list documentlist",
    "instruction": "prompt task taskdescription systemprompt",
    "top_k": "k n limit top topresults numresults maxresults size count",
    "truncate": "autotruncate truncation truncateprompttokens",
    "max_tokens_per_doc": "maxlength maxseqlength maxlen maxtokens",
}
"""Names, in lower case and without punctuation, that other services use for a field."""


class Report:
    """The names and sentences of one request that its client should know.

    Args:
        unread: names that are no fields.
        fields: the fields that they may stand for.
    """

    __slots__ = ("ignored", "keys", "objects", "warnings")

    def __init__(self, unread: Sequence[str], fields: tuple[str, ...]) -> None:
        names = [token(name) for name in unread[: 3 * MAX_NAMES]]
        if len(unread) > MAX_NAMES:  # those that may be meant for a field first
            names.sort(key=lambda name: "did you mean" not in _note(name, fields))
        self.ignored = names[:MAX_NAMES]
        self.warnings = [_note(name, fields) for name in self.ignored]
        if len(unread) > MAX_NAMES:
            more = " or more" if len(unread) == MAX_SEEN else ""
            self.warnings.append(f"{len(unread) - MAX_NAMES}{more} other fields are not read either")
        self.objects = 0
        """Documents that are objects."""
        self.keys: dict[str, None] = {}
        """Keys of theirs that are not read."""

    def ignore(self, name: str, warning: str) -> None:
        """Add a name."""
        if len(self.ignored) < MAX_NAMES:
            self.ignored.append(token(name))
            self.warnings.append(warning)

    def first(self, values: Mapping[str, Any], name: str, alias: str) -> Any:
        """Return the value of a field that has two names; an alias with another value is added."""
        value, other = values.get(name), values.get(alias)
        if value is None:
            return other
        if other is not None and other != value:
            self.ignore(alias, f"{alias} is not read beside {name}")
        return value

    def collect_keys(self, document: Mapping[str, Any], key: str) -> None:
        """Remember the keys of an object document, of which `key` is read."""
        if len(document) > 1 and len(self.keys) < MAX_NAMES:
            self.keys |= dict.fromkeys(
                name
                for name, value in islice(document.items(), MAX_SEEN)
                if value is not None and name != key and name not in _HARMLESS_KEYS
            )


def is_harmless(name: str, value: Any) -> bool:
    """Whether a field that is not read needs no report."""
    if name == "truncation_direction":  # documents are truncated on the right
        return isinstance(value, str) and value.lower() == "right"
    return name in _HARMLESS


def token(name: str) -> str:
    """Return a client's name for a field as it may stand in a header, a log line and an error."""
    return _NO_TOKEN.sub("_", name[:_MAX_NAME]) or "_"


def missing_hint(field: str, unread: Iterable[str]) -> str:
    """Return the end of an error about a required field, with the unread name that resembles it; "" if none does."""
    for name in map(token, islice(unread, 2 * MAX_NAMES)):
        if any(_meant(name, (field,))):
            return f'; "{name}" is not read, did you mean {field}?'
    return ""


@lru_cache(maxsize=256)
def _note(name: str, fields: tuple[str, ...]) -> str:
    meant = next(_meant(name, fields), None)
    return f"{name} is not read" + (f"; did you mean {meant}?" if meant else "")


def _meant(name: str, fields: Sequence[str]) -> Iterator[str]:
    """Fields that a name may stand for, the likeliest first."""
    folded = _folded(name)
    known = {_folded(field): field for field in fields}
    if folded in known:
        yield known[folded]
    yield from (field for field in fields if folded in _SYNONYMS.get(field, "").split())
    yield from (known[close] for close in difflib.get_close_matches(folded, known, cutoff=0.75))


def _folded(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
