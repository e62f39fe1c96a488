"""The one schema of a rerank request: HTTP bodies, lines of a batch and rows of Parquet mean the same.

`reranker.request.fields` declares each field once. Everything that a client sends and that is not read as it stands is
reported: by an error of one line, or by `ParsedRequest.ignored` and `ParsedRequest.warnings`. None of them holds a
value, only names of fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reranker.errors import InvalidRequestError
from reranker.request.fields import COUNT_RULE, COUNTS, DOCUMENT, FIELDS, MAY_BE_EMPTY, OPTIONAL, TEXT_KEYS, refuse
from reranker.request.template import looks_wrapped, unwrap_document, unwrap_query
from reranker.request.unread import MAX_SEEN, TEMPLATE_VALUES, Report, is_harmless, missing_hint, token
from reranker.text import printable
from reranker.types import MAX_CHUNKS, RerankRequest

_INSTRUCTIONS = ("instruction", "instruct")


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
    """Names of fields that were not read, at most `unread.MAX_NAMES`; `documents.title` is a key of documents. Each
    consists of characters that a token of an HTTP header may have."""
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
    values, unread = _read(body, "documents" if texts == "texts" else "texts")
    for name in ("query", texts):
        if name not in values:
            raise InvalidRequestError(f"{name}: is required{missing_hint(name, unread)}")
    has_model, is_tei = "model" in values, texts == "texts"
    report = Report(unread, OPTIONAL)
    instruction = _instruction(values, body.get(TEMPLATE_VALUES), report)
    if is_tei and body.get("documents") is not None:
        report.ignore("documents", "documents is not read beside texts")
    counts = _counts(values, has_model)
    documents = _documents(texts, values[texts], values.get("rank_fields"), max_documents, report)
    return ParsedRequest(
        _rerank_request(values, counts, instruction, documents, is_tei, report),
        report.first(counts, "top_k", "top_n"),
        return_documents=bool(report.first(values, "return_documents", "return_text")),
        raw_scores=_raw_scores(values, report),
        has_model=has_model,
        is_tei=is_tei,
        ignored=tuple(report.ignored),
        warnings=tuple(report.warnings),
    )


def _read(body: Mapping[str, Any], other: str) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all fields but `other`, and the names that are no fields."""
    values: dict[str, Any] = {}
    unread: list[str] = []
    for name, value in body.items():
        if value is None or (value == "" and name not in MAY_BE_EMPTY):
            continue
        if name in FIELDS:
            if name != other:
                values[name] = FIELDS[name].read(name, value)
        elif len(unread) < MAX_SEEN and not is_harmless(name, value):
            unread.append(name)
    return values, unread


def _rerank_request(
    values: Mapping[str, Any],
    counts: Mapping[str, int],
    instruction: str | None,
    documents: list[str],
    is_tei: bool,
    report: Report,
) -> RerankRequest:
    query, instruction, documents = _unwrapped(values["query"], instruction, documents, report)
    chunks = report.first(counts, "max_chunks_per_doc", "max_chunk_per_doc")
    if chunks is not None and chunks > MAX_CHUNKS:
        chunks = MAX_CHUNKS
        report.warnings.append(f"max_chunks_per_doc: a document is split into at most {MAX_CHUNKS} chunks")
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


def _instruction(values: Mapping[str, Any], template_values: Any, report: Report) -> str | None:
    """Return the request's instruction; without one, that of the values for vLLM's chat template."""
    instruction: str | None = report.first(values, *_INSTRUCTIONS)
    if isinstance(template_values, dict):
        for key in _INSTRUCTIONS:
            name, value = f"{TEMPLATE_VALUES}.{key}", template_values.get(key)
            if value is None or value == "":
                continue
            text = FIELDS[key].read(name, value)
            if instruction is None:
                instruction = text
            elif text != instruction:
                report.ignore(name, f"{name} is not read beside another instruction")
    return instruction


def json_schema(documents: str) -> dict[str, Any]:
    """JSON Schema of a request whose documents are called `documents` or `texts`.

    It leaves one thing open, because JSON Schema cannot say it: object documents have the fields that `rank_fields`
    names.
    """
    other = "documents" if documents == "texts" else "texts"
    properties = {name: field.schema for name, field in FIELDS.items() if name != other}
    properties[TEMPLATE_VALUES] = {
        "description": "Of an object, instruction and instruct are read where the request has neither, as vLLM does",
        "properties": {name: FIELDS[name].schema for name in _INSTRUCTIONS},
    }
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
                "else": {"properties": dict.fromkeys(COUNTS, zero)},
            },
            {
                "if": {"required": ["rank_fields"], "properties": {"rank_fields": {"type": "array", "minItems": 1}}},
                "else": {"properties": {documents: {"items": DOCUMENT}}},
            },
        ],
    }


def _raw_scores(values: Mapping[str, Any], report: Report) -> bool:
    """Whether logits are asked for; `use_activation` is the opposite of `raw_scores`."""
    raw, activation = values.get("raw_scores"), values.get("use_activation")
    if raw is not None and raw is activation:  # each asks for what the other does not want: logits, as either alone
        name, other = ("use_activation", "raw_scores") if raw else ("raw_scores", "use_activation")
        report.ignore(name, f"{name} is not read beside {other}")
    return bool(raw) or activation is False


def _counts(values: Mapping[str, Any], has_model: bool) -> dict[str, int]:
    """Return the counts that are set. Beside a model 0 is "not set", as clients in Go and vLLM's own send it."""
    counts: dict[str, int] = {name: values[name] for name in COUNTS if name in values}
    for name, count in counts.items():
        if count == 0 and not has_model:
            raise InvalidRequestError(f"{name}: {COUNT_RULE}")
    return {name: count for name, count in counts.items() if count}


def _documents(
    name: str, documents: list[Any], rank_fields: list[str] | None, max_documents: int | None, report: Report
) -> list[str]:
    """Return the text of every document."""
    if max_documents is not None and len(documents) > max_documents:
        raise InvalidRequestError(
            f"{name}: at most {max_documents} in one request; send {len(documents)} in several requests"
        )
    texts = [
        printable(
            document if isinstance(document, str) else _object_text(f"{name}[{i}]", document, rank_fields, report)
        )
        for i, document in enumerate(documents)
    ]
    if rank_fields and not report.objects:
        report.ignore("rank_fields", "rank_fields is not read: no document is an object")
    for key in report.keys:
        report.ignore(f"{name}.{key}", f"{name}: {token(key)} is not read; to have it read, name it in rank_fields")
    return texts


def _object_text(where: str, document: Any, rank_fields: list[str] | None, report: Report) -> str:
    """Return the text of a document that is an object."""
    rule = 'must be a string or an object with a string "text" (or "content", "page_content")'
    if not isinstance(document, dict):
        refuse(where, rule, document)
    report.objects += 1
    if rank_fields:
        return _joined(where, document, rank_fields)
    key = next((key for key in TEXT_KEYS if document.get(key) is not None), None)
    if key is None or not isinstance(document[key], str):
        raise InvalidRequestError(f"{where}: {rule}; rank_fields names other fields")
    report.collect_keys(document, key)
    text: str = document[key]
    return text


def _joined(where: str, document: Mapping[str, Any], rank_fields: Sequence[str]) -> str:
    """Join the named fields of an object, a line `name: value` each."""
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
            refuse(where, f"the field of rank_fields[{i}] must be text, a number, true, false or null", value)
        lines.append(value if rank_fields == ["text"] else f"{field}: {value}")
    return "\n".join(lines)


def _unwrapped(
    query: str, instruction: str | None, documents: list[str], report: Report
) -> tuple[str, str | None, list[str]]:
    """Take Qwen's published template off query, instruction and documents.

    The query decides: the client formats it itself, whereas a document may come from anywhere.
    """
    if not looks_wrapped(query):
        if unwrap_document(documents[0]) != documents[0]:
            report.warnings.append(
                "documents: the first one is in Qwen's prompt template and the query is not, so all are read as text; "
                "send the bare documents"
            )
        return query, instruction, documents
    wrapped = unwrap_query(query)
    if wrapped is None:
        report.warnings.append(
            "query: begins like a prompt template and is read as text; send the bare query, the template is added here"
        )
        return query, instruction, documents
    if not wrapped.query.strip():
        raise InvalidRequestError("query: must not be empty inside the template")
    bare = list(map(unwrap_document, documents))
    worn = sum(text != document for text, document in zip(bare, documents, strict=True))
    off = "query and documents" if worn == len(documents) else "the query and some documents" if worn else "the query"
    report.warnings.append(
        f"query: Qwen's prompt template was taken off {off}; send the bare texts"
        + ("; the instruction inside it is not read beside the request's" if instruction else "")
    )
    return wrapped.query, instruction or wrapped.instruction or None, bare
