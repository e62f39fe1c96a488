"""The fields of a rerank request: a reader, which raises the error of a wrong value, and the JSON Schema of each."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from reranker.errors import InvalidRequestError
from reranker.text import printable
from reranker.types import MAX_CHUNKS

MAX_RANK_FIELDS = 32
"""Names in `rank_fields`: each is looked up in every document."""
TEXT_KEYS = ("text", "content", "page_content")
"""Keys of an object document for its text; the first that is not null is read."""


def json_kind(value: object) -> str:
    """The kind of a JSON value, for error texts."""
    return "null" if value is None else _KINDS.get(type(value), "another value")


_KINDS = {str: "a string", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}


def refuse(name: str, rule: str, value: Any) -> NoReturn:
    """Raise the InvalidRequestError of a field that breaks a rule, with the kind of its value."""
    raise InvalidRequestError(f"{name}: {rule}; got {json_kind(value)}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        refuse(name, "must be a string", value)
    return printable(value)


def _query(name: str, value: Any) -> str:
    text = _text(name, value)
    if not text.strip():
        raise InvalidRequestError(f"{name}: must not be empty")
    return text


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        refuse(name, 'must be a list of texts, such as ["a", "b"]', value)
    if not value:
        raise InvalidRequestError(f'{name}: must hold at least one text, such as ["a", "b"]; the list is empty')
    return value


_DIGITS = re.compile("0|[1-9][0-9]{0,17}")


def _count(name: str, value: Any) -> int:
    """Read a whole number from 0; parse.py decides whether 0 is valid."""
    if isinstance(value, str):
        value = int(value) if _DIGITS.fullmatch(value) else -1
    # JSON has no integers, only numbers without a fraction: 3.0 and 1e20 are valid.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequestError(f"{name}: {COUNT_RULE}")
    return value


COUNT_RULE = "must be a whole number of at least 1, or null"

# RAGFlow sends "true", Python's str() gives "True"; the keys True and False match 1 and 0 too.
_FLAGS: dict[object, bool] = dict.fromkeys((True, "True", "true", "TRUE", "1"), True) | dict.fromkeys(
    (False, "False", "false", "FALSE", "0"), False
)


def _flag(name: str, value: Any) -> bool:
    flag = _FLAGS.get(value) if isinstance(value, (int, float, str)) else None
    if flag is None:
        raise InvalidRequestError(f"{name}: must be true or false")
    return flag


def _rank_fields(name: str, value: Any) -> list[str]:
    rule = 'must be a list of names of fields, such as ["title", "text"]'
    if not isinstance(value, list):
        refuse(name, rule, value)
    if len(value) > MAX_RANK_FIELDS:
        raise InvalidRequestError(f"{name}: at most {MAX_RANK_FIELDS} names")
    for i, field in enumerate(value):
        if not isinstance(field, str):
            refuse(f"{name}[{i}]", "must be a string", field)
    return list(dict.fromkeys(value))


@dataclass(frozen=True, slots=True)
class Field:
    """A field; `read(name, value)` checks and converts a value that is not null."""

    read: Callable[[str, Any], Any]
    schema: dict[str, Any]


def _optional(read: Callable[[str, Any], Any], description: str) -> Field:
    return Field(read, {"anyOf": [_SCHEMAS[read], {"enum": [None, ""]}], "description": description})


_SCHEMAS: dict[Callable[[str, Any], Any], dict[str, Any]] = {
    _text: {"type": "string"},
    _count: {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^({_DIGITS.pattern})$"}]},
    _flag: {"anyOf": [{"type": "boolean"}, {"enum": [*(flag for flag in _FLAGS if isinstance(flag, str)), 1, 0]}]},
    _rank_fields: {"type": "array", "items": {"type": "string"}, "maxItems": MAX_RANK_FIELDS},
}
_DOCUMENTS = Field(
    _list,
    {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [{"type": "string"}, {"type": "object"}]},
        "description": 'Texts, or objects with their text in "text", "content" or "page_content", or in the fields of '
        "rank_fields",
        "examples": [["a small animal", "a bread"]],
    },
)


def _object_schema(*keys: str) -> dict[str, Any]:
    """Return the schema of an object with its text in the last of the keys and null in the others."""
    kinds = {key: {"type": "null"} for key in keys[:-1]} | {keys[-1]: {"type": "string"}}
    return {"type": "object", "required": [keys[-1]], "properties": kinds}


DOCUMENT = {"anyOf": [{"type": "string"}, *(_object_schema(*TEXT_KEYS[: i + 1]) for i in range(len(TEXT_KEYS)))]}
FIELDS: dict[str, Field] = {
    "query": Field(
        _query, {"type": "string", "pattern": r"\S", "description": "The search query", "examples": ["what is a cat?"]}
    ),
    "documents": _DOCUMENTS,
    "texts": _DOCUMENTS,
    "top_k": _optional(_count, "Max results; null, or 0 beside a model: all"),
    "top_n": _optional(_count, "The same as top_k, which has precedence"),
    "instruction": _optional(_text, "Replaces the default instruction"),
    "instruct": _optional(_text, "The same as instruction, which has precedence"),
    "return_documents": _optional(_flag, "Return the texts as well"),
    "return_text": _optional(_flag, "The same as return_documents"),
    "rank_fields": _optional(
        _rank_fields,
        "Fields of object documents that are read, joined as lines `name: value`; every object must have them. "
        'A null is left out. ["text"] alone is the text without its name',
    ),
    "max_tokens_per_doc": _optional(_count, "Max tokens of a document, or of each of its chunks; null: as many as fit"),
    "max_chunks_per_doc": _optional(
        _count,
        f"A longer document is split into at most this many chunks (limit {MAX_CHUNKS}) and gets the score of its best "
        "one; null: it is truncated",
    ),
    "max_chunk_per_doc": _optional(_count, "The same as max_chunks_per_doc, which has precedence"),
    "raw_scores": _optional(_flag, "Return logits instead of probabilities"),
    "use_activation": _optional(_flag, "false: the same as raw_scores: true"),
    "truncate": _optional(
        _flag,
        "false: a document that does not fit is an error instead of truncated (not with texts). true: a query that "
        "leaves no room for a document is truncated instead of an error (with texts always)",
    ),
    "model": _optional(_text, "Any string; the response names the model that is served"),
}
COUNTS = tuple(name for name, field in FIELDS.items() if field.read is _count)
"""Fields with a whole number."""
OPTIONAL = tuple(name for name in FIELDS if name not in ("query", "documents", "texts"))
MAY_BE_EMPTY = frozenset(FIELDS) - frozenset(OPTIONAL) | {"model"}
"""Fields in which an empty string is a value; in all others it counts as absent."""
