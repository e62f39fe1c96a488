"""The one schema of a rerank request: HTTP bodies, lines of a batch and rows of Parquet mean the same.

A field is declared once in `_FIELDS`, with its reader and its JSON Schema. Everything that a client sends and that is
not read as it stands is reported: by an error of one line, or by `ParsedRequest.ignored` and `ParsedRequest.warnings`.
Neither holds a value, only names of fields.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, NoReturn

from reranker.engine.text import printable
from reranker.errors import InvalidRequestError
from reranker.template import looks_wrapped, unwrap_document, unwrap_query
from reranker.types import MOST_CHUNKS, RerankRequest

MAX_RANK_FIELDS = 32
"""Names in `rank_fields`: each costs a look into every document."""
_MAX_NAMES = 10
"""Unread names that are reported of one request."""
_MAX_NAME = 40
"""Characters of a reported name."""
_MAX_SEEN = 100
"""Unread names that are kept of a body or of one document, which may hold a million."""

_TEXT_KEYS = ("text", "content", "page_content")
"""Keys of an object document for its text; the first one that is not null is read."""

# Clients send these and do not depend on an effect. docs/clients.md says which client sends which.
_HARMLESS = frozenset(
    "user priority encoding_format request_id cache_salt chat_template_kwargs truncation_direction model-id "
    "is_truncated overlap_tokens return_len kwargs property".split()
)
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


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request in the engine's words, with the form of its answer and the names of fields that were not read."""

    request: RerankRequest
    limit: int | None
    """How many results are wanted; None: all."""
    return_documents: bool
    raw_scores: bool
    """Whether logits are wanted in place of probabilities."""
    has_model: bool
    is_tei: bool
    """Whether the documents came as `texts`, as clients of text-embeddings-inference send them."""
    ignored: tuple[str, ...]
    """Names of fields that were not read, at most `_MAX_NAMES`; `documents.title` is a key of documents. Each consists
    of characters that an HTTP header's token may have."""
    warnings: tuple[str, ...]
    """Sentences for the client: one for each ignored name, and one for each thing that is done differently."""


def parse_request(body: Mapping[str, Any], *, max_documents: int | None = None) -> ParsedRequest:
    """Read the fields of a request. A null counts as absent, and so does "" in a field that is not required.

    Args:
        body: a JSON object.
        max_documents: limit, checked before the first document is read.

    Raises:
        InvalidRequestError: a field is wrong; its message names the field and says how to fix it.
    """
    texts = "texts" if body.get("texts") is not None else "documents"
    fields = _TEI_FIELDS if texts == "texts" else _FIELDS
    values, unread = _read(body, fields)
    for name in ("query", texts):
        if name not in values:
            raise InvalidRequestError(f"{name}: is required{_missing_hint(name, unread)}")
    has_model, is_tei = "model" in values, texts == "texts"
    notes = _Notes(unread)
    counts = _counts(values, has_model)
    documents = _documents(texts, values[texts], values.get("rank_fields"), max_documents, notes)
    return ParsedRequest(
        _rerank_request(values, counts, documents, is_tei, notes),
        notes.first(counts, "top_k", "top_n"),
        return_documents=bool(values.get("return_documents") or values.get("return_text")),
        raw_scores=bool(values.get("raw_scores")) or values.get("use_activation") is False,
        has_model=has_model,
        is_tei=is_tei,
        ignored=tuple(notes.ignored),
        warnings=tuple(notes.warnings),
    )


def _read(body: Mapping[str, Any], fields: Mapping[str, _Field]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of the fields that are there, and the names that are no fields."""
    values: dict[str, Any] = {}
    unread: list[str] = []
    for name, value in body.items():
        if value is None or (value == "" and name not in _MAY_BE_EMPTY):
            continue
        if name in fields:
            values[name] = fields[name].read(name, value)
        elif len(unread) < _MAX_SEEN and not _is_harmless(name, value):
            unread.append(name)
    return values, unread


def _rerank_request(
    values: Mapping[str, Any], counts: Mapping[str, int], documents: list[str], is_tei: bool, notes: _Notes
) -> RerankRequest:
    instruction = notes.first(values, "instruction", "instruct")
    query, instruction, documents = _unwrapped(values["query"], instruction, documents, notes)
    chunks = notes.first(counts, "max_chunks_per_doc", "max_chunk_per_doc")
    if chunks is not None and chunks > MOST_CHUNKS:
        chunks = MOST_CHUNKS
        notes.warnings.append(f"max_chunks_per_doc: a document is split into at most {MOST_CHUNKS} chunks")
    # litellm sends `truncate: false` with texts whether its user wants it or not.
    truncate = True if is_tei else values.get("truncate")
    return RerankRequest(
        query,
        documents,
        instruction,
        counts.get("max_tokens_per_doc"),
        chunks,
        truncate=truncate is not False,
        truncate_query=truncate is True,
    )


def json_schema(documents: str) -> dict[str, Any]:
    """JSON Schema of a request whose documents are called `documents` or `texts`.

    It leaves one thing open, because JSON Schema cannot say it: object documents have the fields that `rank_fields`
    names.
    """
    other = "documents" if documents == "texts" else "texts"
    properties = {name: field.schema for name, field in _FIELDS.items() if name != other}
    if documents == "documents":
        properties["texts"] = {"type": "null"}
    zero = {"not": {"enum": [0, "0"]}}
    return {
        "title": "TeiBody" if documents == "texts" else "RerankBody",
        "description": f"Rank `{documents}` by relevance to `query`. A null counts as absent, and so does an empty "
        "string in a field that is not required. Fields that are not read are named in the header x-ignored-fields.",
        "type": "object",
        "required": ["query", documents],
        "properties": properties,
        "allOf": [
            {  # without a model 0 is an error, with one it is "not set"
                "if": {"required": ["model"], "properties": {"model": {"type": "string"}}},
                "else": {"properties": dict.fromkeys(_COUNTS, zero)},
            },
            {
                "if": {"required": ["rank_fields"], "properties": {"rank_fields": {"type": "array", "minItems": 1}}},
                "else": {"properties": {documents: {"items": _DOCUMENT}}},
            },
        ],
    }


def json_kind(value: object) -> str:
    """The kind of a JSON value, for error texts."""
    return _KINDS.get(type(value), "another value")


_KINDS = {
    str: "a string",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


def _refuse(name: str, rule: str, value: Any) -> NoReturn:
    raise InvalidRequestError(f"{name}: {rule}; got {json_kind(value)}")


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(name, "must be a string", value)
    return printable(value)


def _query(name: str, value: Any) -> str:
    text = _text(name, value)
    if not text.strip():
        raise InvalidRequestError(f"{name}: must not be empty")
    return text


def _list(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        _refuse(name, 'must be a list of texts, such as ["a", "b"]', value)
    if not value:
        raise InvalidRequestError(f'{name}: must hold at least one text, such as ["a", "b"]; the list is empty')
    return value


_DIGITS = re.compile("0|[1-9][0-9]{0,17}")


def _count(name: str, value: Any) -> int:
    """A whole number from 0; `_counts` decides what 0 means."""
    if isinstance(value, str):
        value = int(value) if _DIGITS.fullmatch(value) else -1
    # JSON knows no integers, only numbers without a fraction: 3.0 and 1e20 are as good as 3.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequestError(f"{name}: {_COUNT_RULE}")
    return value


_COUNT_RULE = "must be a whole number of at least 1, or null"

# RAGFlow sends "true"; Python's str() makes "True"; 1 equals True as a key.
_FLAGS: dict[float | str, bool] = {
    flag: value
    for value in (True, False)
    for flag in (value, str(value), str(value).lower(), str(value).upper(), str(int(value)))
}


def _flag(name: str, value: Any) -> bool:
    flag = _FLAGS.get(value) if isinstance(value, (int, float, str)) else None
    if flag is None:
        raise InvalidRequestError(f"{name}: must be true or false")
    return flag


def _rank_fields(name: str, value: Any) -> list[str]:
    rule = 'must be a list of names of fields, such as ["title", "text"]'
    if not isinstance(value, list):
        _refuse(name, rule, value)
    if len(value) > MAX_RANK_FIELDS:
        raise InvalidRequestError(f"{name}: at most {MAX_RANK_FIELDS} names")
    for i, field in enumerate(value):
        if not isinstance(field, str):
            _refuse(f"{name}[{i}]", "must be a string", field)
    return list(dict.fromkeys(value))


@dataclass(frozen=True, slots=True)
class _Field:
    read: Callable[[str, Any], Any]
    schema: dict[str, Any]


def _optional(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {"anyOf": [schema, {"enum": [None, ""]}], "description": description}


def _count_field(description: str) -> _Field:
    digits = {"type": "string", "pattern": f"^({_DIGITS.pattern})$"}
    return _Field(_count, _optional({"anyOf": [{"type": "integer", "minimum": 0}, digits]}, description))


def _flag_field(description: str) -> _Field:
    texts = sorted(flag for flag in _FLAGS if isinstance(flag, str))
    return _Field(_flag, _optional({"anyOf": [{"type": "boolean"}, {"enum": [*texts, 1, 0]}]}, description))


def _text_field(description: str) -> _Field:
    return _Field(_text, _optional({"type": "string"}, description))


def _documents_field(name: str) -> _Field:
    items = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    text = 'Texts, or objects with their text in "text", "content" or "page_content", or in the fields of rank_fields'
    examples = [["a small animal", "a bread"]]
    return _Field(_list, {"type": "array", "minItems": 1, "items": items, "description": text, "examples": examples})


def _object_schema(*keys: str) -> dict[str, Any]:
    """An object with its text in the last of the keys, and nothing in those before."""
    kinds = {key: {"type": "null"} for key in keys[:-1]} | {keys[-1]: {"type": "string"}}
    return {"type": "object", "required": [keys[-1]], "properties": kinds}


_DOCUMENT = {
    "anyOf": [{"type": "string"}, *(_object_schema(*_TEXT_KEYS[: i + 1]) for i in range(len(_TEXT_KEYS)))],
}
_FIELDS: dict[str, _Field] = {
    "query": _Field(
        _query,
        {
            "type": "string",
            "minLength": 1,
            "pattern": r"\S",
            "description": "What is searched for",
            "examples": ["what is a cat?"],
        },
    ),
    "documents": _documents_field("documents"),
    "texts": _documents_field("texts"),
    "top_k": _count_field("How many results; null, or 0 beside a model: all"),
    "top_n": _count_field("The same as top_k, which has precedence"),
    "instruction": _text_field("Replaces the default instruction"),
    "instruct": _text_field("The same as instruction, which has precedence"),
    "return_documents": _flag_field("Answer the texts as well"),
    "return_text": _flag_field("The same as return_documents"),
    "rank_fields": _Field(
        _rank_fields,
        _optional(
            {"type": "array", "items": {"type": "string"}, "maxItems": MAX_RANK_FIELDS},
            "Fields of object documents that are read, joined as lines `name: value`; every object must have them. "
            'A null is left out. ["text"] alone is the text without its name',
        ),
    ),
    "max_tokens_per_doc": _count_field("Tokens of a document that are read at once; null: what fits"),
    "max_chunks_per_doc": _count_field(
        f"A longer document is split into at most this many chunks (limit {MOST_CHUNKS}) and has the score of its best "
        "one; null: it is truncated"
    ),
    "max_chunk_per_doc": _count_field("The same as max_chunks_per_doc, which has precedence"),
    "raw_scores": _flag_field("Answer logits instead of probabilities"),
    "use_activation": _flag_field("false: the same as raw_scores: true"),
    "truncate": _flag_field(
        "false: a document that does not fit is an error instead of truncated (texts are truncated all the same). "
        "true: so is a query that leaves no room for a document; with texts it always is"
    ),
    "model": _text_field("Any string; the answer names the model that is served"),
}
_COUNTS = tuple(name for name, field in _FIELDS.items() if field.read is _count)
FIELDS = tuple(_FIELDS)
"""The names of all fields that are read."""
_OPTIONAL = tuple(name for name in FIELDS if name not in ("query", "documents", "texts"))
_TEI_FIELDS = {name: field for name, field in _FIELDS.items() if name != "documents"}
_MAY_BE_EMPTY = frozenset(FIELDS) - frozenset(_OPTIONAL) | {"model"}


class _Notes:
    """Collects what is not read of one request."""

    __slots__ = ("ignored", "keys", "objects", "warnings")

    def __init__(self, unread: Sequence[str]) -> None:
        self.ignored = [_token(name) for name in unread[:_MAX_NAMES]]
        self.warnings = [_unread_note(name) for name in self.ignored]
        self.objects = 0
        """Documents that are objects."""
        self.keys: dict[str, None] = {}
        """Keys of theirs that are not read."""

    def ignore(self, name: str, warning: str) -> None:
        """Report one more name."""
        if len(self.ignored) < _MAX_NAMES:
            self.ignored.append(_token(name))
            self.warnings.append(warning)

    def first(self, values: Mapping[str, Any], name: str, alias: str) -> Any:
        """The value of a field with two names; an alias that says something else is reported."""
        value, other = values.get(name), values.get(alias)
        if value is None:
            return other
        if other is not None and other != value:
            self.ignore(alias, f"{alias} is not read beside {name}")
        return value


def _counts(values: Mapping[str, Any], has_model: bool) -> dict[str, int]:
    """The counts that limit anything. Beside a model 0 is "not set", as clients in Go and vLLM's own send it."""
    counts: dict[str, int] = {name: values[name] for name in _COUNTS if name in values}
    for name, count in counts.items():
        if count == 0 and not has_model:
            raise InvalidRequestError(f"{name}: {_COUNT_RULE}")
    return {name: count for name, count in counts.items() if count}


def _documents(
    name: str, documents: list[Any], rank_fields: list[str] | None, max_documents: int | None, notes: _Notes
) -> list[str]:
    """The text of every document."""
    if max_documents is not None and len(documents) > max_documents:
        raise InvalidRequestError(
            f"{name}: at most {max_documents} in one request; send {len(documents)} in several requests"
        )
    texts = [
        printable(document if isinstance(document, str) else _object_text(f"{name}[{i}]", document, rank_fields, notes))
        for i, document in enumerate(documents)
    ]
    if rank_fields and not notes.objects:
        notes.ignore("rank_fields", "rank_fields is not read: no document is an object")
    for key in notes.keys:
        notes.ignore(f"{name}.{key}", f"{name}: {_token(key)} is not read; rank_fields names the fields that are")
    return texts


def _object_text(where: str, document: Any, rank_fields: list[str] | None, notes: _Notes) -> str:
    """The text of a document that is an object."""
    rule = 'must be a string or an object with a string "text" (or "content", "page_content")'
    if not isinstance(document, dict):
        _refuse(where, rule, document)
    notes.objects += 1
    if rank_fields:
        return _joined(where, document, rank_fields)
    key = next((key for key in _TEXT_KEYS if document.get(key) is not None), None)
    if key is None or not isinstance(document[key], str):
        raise InvalidRequestError(f"{where}: {rule}; rank_fields names other fields")
    if len(document) > 1 and len(notes.keys) < _MAX_NAMES:
        notes.keys |= dict.fromkeys(
            name
            for name, value in islice(document.items(), _MAX_SEEN)
            if value is not None and name != key and name not in _HARMLESS_KEYS
        )
    text: str = document[key]
    return text


def _joined(where: str, document: Mapping[str, Any], rank_fields: Sequence[str]) -> str:
    """The named fields of an object, a line `name: value` each."""
    lines: list[str] = []
    for i, field in enumerate(rank_fields):
        if field not in document:
            raise InvalidRequestError(f"{where}: has no field of the name that rank_fields[{i}] gives")
        value = document[field]
        if value is None:
            continue
        if isinstance(value, (bool, int, float)):
            value = json.dumps(value)
        if not isinstance(value, str):
            _refuse(where, f"the field of rank_fields[{i}] must be text, a number, true, false or null", value)
        lines.append(value if rank_fields == ["text"] else f"{field}: {value}")
    return "\n".join(lines)


def _unwrapped(
    query: str, instruction: str | None, documents: list[str], notes: _Notes
) -> tuple[str, str | None, list[str]]:
    """Query, instruction and documents without Qwen's published template.

    The query decides: the client formats it itself, whereas a document may come from anywhere.
    """
    if not looks_wrapped(query):
        return query, instruction, documents
    wrapped = unwrap_query(query)
    if wrapped is None:
        notes.warnings.append(
            "query: begins like a prompt template and is read as text; send the bare query, the template is added here"
        )
        return query, instruction, documents
    if not wrapped.query.strip():
        raise InvalidRequestError("query: must not be empty inside the template")
    notes.warnings.append(
        "query: Qwen's prompt template was taken off query and documents; send the bare texts"
        + ("; the instruction inside it is not read beside the request's" if instruction else "")
    )
    return wrapped.query, instruction or wrapped.instruction, list(map(unwrap_document, documents))


def _is_harmless(name: str, value: Any) -> bool:
    if name == "truncation_direction":  # documents are truncated on the right
        return isinstance(value, str) and value.lower() == "right"
    return name in _HARMLESS


_NO_TOKEN = re.compile(r"[^!#$%&'*+.^`|~\w-]", re.ASCII)


def _token(name: str) -> str:
    """A client's name for a field, as it may stand in a header, a log line and an error."""
    return _NO_TOKEN.sub("_", name[:_MAX_NAME])


def _folded(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


@lru_cache(maxsize=256)
def _unread_note(name: str) -> str:
    if name in FIELDS:
        return f"{name} is not read beside texts"
    meant = next(_meant(name, _OPTIONAL), None)  # those that are required are there
    return f"{name} is not read" + (f"; did you mean {meant}?" if meant else "")


def _meant(name: str, fields: Iterable[str]) -> Iterator[str]:
    """Fields that a name may stand for, the likeliest first."""
    folded = _folded(name)
    known = {_folded(field): field for field in fields}
    if folded in known:
        yield known[folded]
    yield from (field for field in fields if folded in _SYNONYMS.get(field, "").split())
    yield from (known[close] for close in difflib.get_close_matches(folded, known, cutoff=0.75))


def _missing_hint(field: str, unread: Iterable[str]) -> str:
    """Names what was sent in the place of a required field, if anything looks like it."""
    for name in map(_token, islice(unread, 2 * _MAX_NAMES)):
        if any(_meant(name, [field])):
            return f'; "{name}" is not read, did you mean {field}?'
    return ""
