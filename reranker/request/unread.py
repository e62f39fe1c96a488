"""Names of fields that are not read: the harmless ones, the fields they may stand for, and the report of a request.

The names are a client's, so each is shortened and cleaned for headers, log lines and errors, and their number is
limited. Values are never reported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

from reranker.request.fields import OPTIONAL

MAX_NAMES = 10
"""Reported names of one request."""
MAX_SEEN = 100
"""Unread names kept of a body or of one document, which may hold a million."""
_MAX_NAME = 40
"""Characters of a reported name."""
_NO_TOKEN = re.compile(r"[^!#$%&'*+.^`|~\w-]", re.ASCII)

TEMPLATE_VALUES = "chat_template_kwargs"
"""Field in which clients of vLLM send the values of a chat template, an instruction among them."""

# Clients send these without depending on an effect. docs/clients.md says which client sends which.
_HARMLESS = frozenset(
    "user priority encoding_format request_id cache_salt model-id is_truncated overlap_tokens "
    "return_len kwargs property".split()
) | {TEMPLATE_VALUES}
_DEFAULTS: dict[str, object] = {
    "truncation_direction": "right",  # of text-embeddings-inference; the others are vLLM's
    "truncation_side": "right",
    "truncate_prompt_tokens": -1,  # as many as fit
    "max_tokens_per_query": 0,
    "padding": "do_not_pad",
}
"""The values of unread fields that need no report."""
_HARMLESS_KEYS = frozenset(("id", "meta", "metadata"))
"""The same for object documents."""

_SYNONYMS = {
    "query": "q question text text1 data1 search searchquery querytext searchtext input keyword keywords prompt "
    "sentence sourcesentence queries topic",
    "queries": "query q question questions",
    "passages": "documents texts docs items candidates",
    "documents": "texts docs doc document passages passage text text2 data2 textlist contents content items sentences "
    "candidates corpus inputs input chunks results pairs nodes strings data list documentlist",
    "instruction": "prompt task taskdescription systemprompt",
    "top_k": "k n limit top topresults numresults maxresults size count",
    "truncate": "autotruncate truncation truncateprompttokens",
    "max_tokens_per_doc": "maxlength maxseqlength maxlen maxtokens",
}
"""Names that other services use for a field, in lower case and without punctuation."""


class Report:
    """The names and sentences about one request that its client should know; `unread` names are no fields."""

    __slots__ = ("ignored", "keys", "objects", "warnings")

    def __init__(self, unread: Sequence[str]) -> None:
        names = [token(name) for name in unread[: 3 * MAX_NAMES]]
        if len(unread) > MAX_NAMES:  # names that resemble a field first
            names.sort(key=lambda name: "did you mean" not in _warning(name))
        self.ignored = names[:MAX_NAMES]
        self.warnings = list(map(_warning, self.ignored))
        if len(unread) > MAX_NAMES:
            more = " or more" if len(unread) == MAX_SEEN else ""
            self.warnings.append(f"{len(unread) - MAX_NAMES}{more} other fields are not read either")
        self.objects = 0
        """Object documents."""
        self.keys: dict[str, None] = {}
        """Their unread keys, in order."""

    def ignore(self, name: str, warning: str) -> None:
        """Add a name."""
        if len(self.ignored) < MAX_NAMES:
            self.ignored.append(token(name))
            self.warnings.append(warning)

    def first(self, values: Mapping[str, Any], name: str, alias: str) -> Any:
        """Return the value of a field with two names, or None; an alias with another value is ignored."""
        value, other = values.get(name), values.get(alias)
        if value is None:
            return other
        if other is not None and other != value:
            self.ignore(alias, f"{alias} is not read beside {name}")
        return value

    def collect_keys(self, document: Mapping[str, Any], key: str) -> None:
        """Add the unread keys of an object document, whose text is in `key`."""
        if len(document) > 1 and len(self.keys) < MAX_NAMES:
            self.keys |= dict.fromkeys(
                name
                for name, value in islice(document.items(), MAX_SEEN)
                if value is not None and name != key and name not in _HARMLESS_KEYS
            )


def is_harmless(name: str, value: Any) -> bool:
    """Whether an unread field needs no report."""
    if name in _DEFAULTS:  # it asks for what is done anyway
        return (value.lower() if isinstance(value, str) else value) == _DEFAULTS[name]
    return name in _HARMLESS


def token(name: str) -> str:
    """Return a client's name for a field in a form for headers, log lines and errors."""
    return _NO_TOKEN.sub("_", name[:_MAX_NAME]) or "_"


def missing_hint(field: str, unread: Iterable[str]) -> str:
    """Return the end of an error about a required field: the unread name that resembles it, or ""."""
    for name in map(token, islice(unread, 2 * MAX_NAMES)):
        if any(_similar(name, (field,))):
            return f'; "{name}" is not read, did you mean {field}?'
    return ""


@lru_cache(maxsize=256)
def _warning(name: str) -> str:
    field = next(_similar(name, OPTIONAL), None)
    return f"{name} is not read" + (f"; did you mean {field}?" if field else "")


def _similar(name: str, fields: Sequence[str]) -> Iterator[str]:
    """Fields that a name may stand for, the likeliest first."""
    folded = _fold(name)
    known = {_fold(field): field for field in fields}
    if folded in known:
        yield known[folded]
    yield from (field for field in fields if folded in _SYNONYMS.get(field, "").split())
    yield from (known[close] for close in difflib.get_close_matches(folded, known, cutoff=0.75))


def _fold(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
