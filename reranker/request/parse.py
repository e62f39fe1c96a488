"""The schema of a rerank request: HTTP bodies, lines of a batch and rows of Parquet have the same meaning.

`reranker.request.fields` declares each field once. A field that is not read as it stands is reported: by an error of
one line, or in `ParsedRequest.ignored` and `ParsedRequest.warnings`. Reports hold names of fields, never values.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from reranker.errors import InvalidRequestError
from reranker.request.fields import COUNT_RULE, COUNTS, FIELDS, MAY_BE_EMPTY, TEXT_KEYS, refuse
from reranker.request.template import looks_wrapped, unwrap_document, unwrap_query
from reranker.request.unread import MAX_SEEN, TEMPLATE_VALUES, Report, is_harmless, missing_hint, token
from reranker.text import printable
from reranker.types import MAX_CHUNKS, RerankRequest

INSTRUCTIONS = ("instruction", "instruct")
"""The names of the instruction, by precedence."""


@dataclass(frozen=True, slots=True)
class ParsedRequest:
    """A request in the engine's terms, the form of its response, and a report of the fields that were not read."""

    request: RerankRequest
    limit: int | None
    """Max results; None: all."""
    return_documents: bool
    raw_scores: bool
    """Logits instead of probabilities."""
    has_model: bool
    is_tei: bool
    """The documents were sent as `texts`, as clients of text-embeddings-inference do."""
    ignored: tuple[str, ...]
    """Names of fields that were not read, at most `unread.MAX_NAMES`; `documents.title` is a key of documents. All are
    valid tokens of an HTTP header."""
    warnings: tuple[str, ...]
    """A sentence for each ignored name and for each field that is read differently from its value."""
    by_query: tuple[RerankRequest, ...] = ()
    """The same documents in one request for each distinct query, if there are several; `request` has the first one."""
    names: Mapping[str, str] | None = None
    """The client's names of the fields that it calls differently, for later errors; see `reranker.request.names`."""


def parse_request(body: Mapping[str, Any], *, max_documents: int | None = None) -> ParsedRequest:
    """Read the fields of a JSON object; `max_documents` is checked before the first document is read.

    A null counts as absent, and so does "" in a field that is not required.

    Raises:
        InvalidRequestError: a field is wrong; its message names the field and says how to fix it.
    """
    is_tei = body.get("texts") is not None
    name, other = ("texts", "documents") if is_tei else ("documents", "texts")
    values, unread = read_fields(body, skip=(other,))
    for field in ("query", name):
        if field not in values:
            raise InvalidRequestError(f"{field}: is required{missing_hint(field, unread)}")
    report = Report(unread)
    instruction = read_instruction(values, body.get(TEMPLATE_VALUES), report)
    if is_tei and body.get("documents") is not None:
        report.ignore("documents", "documents is not read beside texts")
    documents = read_documents(name, values[name], values.get("rank_fields"), max_documents, report)
    return ParsedRequest(
        to_request(values, instruction, documents, is_tei, report),
        limit=report.first(values, "top_k", "top_n"),
        return_documents=bool(report.first(values, "return_documents", "return_text")),
        raw_scores=read_raw_scores(values, report),
        has_model="model" in values,
        is_tei=is_tei,
        ignored=tuple(report.ignored),
        warnings=tuple(report.warnings),
    )


def read_fields(body: Mapping[str, Any], skip: Container[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the values of all fields but those in `skip`, and the names that are no fields."""
    values: dict[str, Any] = {}
    unread: list[str] = []
    for name, value in body.items():
        if value is None or (value == "" and name not in MAY_BE_EMPTY):
            continue
        if name in FIELDS:
            if name not in skip:
                values[name] = FIELDS[name].read(name, value)
        elif len(unread) < MAX_SEEN and not is_harmless(name, value):
            unread.append(name)
    for name in COUNTS:
        if values.get(name) == 0:
            if "model" not in values:
                raise InvalidRequestError(f"{name}: {COUNT_RULE}")
            del values[name]  # "not set", as clients in Go and vLLM's own send it beside a model
    return values, unread


def to_request(
    values: Mapping[str, Any], instruction: str | None, documents: list[str], is_tei: bool, report: Report
) -> RerankRequest:
    """Return the request of checked values in the engine's terms."""
    query, instruction, documents = unwrap(values["query"], instruction, documents, report)
    chunks = report.first(values, "max_chunks_per_doc", "max_chunk_per_doc")
    if chunks is not None and chunks > MAX_CHUNKS:
        chunks = MAX_CHUNKS
        report.warnings.append(f"max_chunks_per_doc: a document is split into at most {MAX_CHUNKS} chunks")
    # litellm always sends `truncate: false` with texts, even if its user did not choose it.
    truncate = True if is_tei else values.get("truncate")
    return RerankRequest(
        query,
        documents,
        instruction,
        values.get("max_tokens_per_doc"),
        chunks,
        truncate=truncate is not False,
        truncate_query=truncate is True,
    )


def read_instruction(values: Mapping[str, Any], template_values: Any, report: Report) -> str | None:
    """Return the request's instruction, or else that of the values for vLLM's chat template."""
    instruction: str | None = report.first(values, *INSTRUCTIONS)
    nested = template_values if isinstance(template_values, dict) else {}
    for key in INSTRUCTIONS:
        if nested.get(key) in (None, ""):
            continue
        name = f"{TEMPLATE_VALUES}.{key}"
        text = FIELDS[key].read(name, nested[key])
        if instruction is None:
            instruction = text
        elif text != instruction:
            report.ignore(name, f"{name} is not read beside another instruction")
    return instruction


def read_raw_scores(values: Mapping[str, Any], report: Report) -> bool:
    """Whether the response holds logits; `use_activation` is the opposite of `raw_scores`."""
    raw, activation = values.get("raw_scores"), values.get("use_activation")
    if raw is not None and raw is activation:  # a contradiction: the field that requests logits is read
        name, other = ("use_activation", "raw_scores") if raw else ("raw_scores", "use_activation")
        report.ignore(name, f"{name} is not read beside {other}")
    return bool(raw) or activation is False


def read_documents(
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
    """Return the text of an object document."""
    rule = 'must be a string or an object with a string "text" (or "content", "page_content")'
    if not isinstance(document, dict):
        refuse(where, rule, document)
    report.objects += 1
    if rank_fields:
        return _join(where, document, rank_fields)
    key = next((key for key in TEXT_KEYS if document.get(key) is not None), None)
    if key is None or not isinstance(document[key], str):
        raise InvalidRequestError(f"{where}: {rule}; rank_fields names other fields")
    report.collect_keys(document, key)
    text: str = document[key]
    return text


def _join(where: str, document: Mapping[str, Any], rank_fields: Sequence[str]) -> str:
    """Join the named fields of an object as lines `name: value`."""
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


def unwrap(
    query: str, instruction: str | None, documents: list[str], report: Report
) -> tuple[str, str | None, list[str]]:
    """Remove Qwen's published template from query, instruction and documents.

    Only if the query has it: the client formats the query itself, whereas a document may be from anywhere.
    """
    wrapped = unwrap_query(query)
    if wrapped is None:
        if looks_wrapped(query):
            report.warnings.append(
                "query: begins like a prompt template and is read as text; send the bare query, the template is added "
                "here"
            )
        elif unwrap_document(documents[0]) != documents[0]:
            report.warnings.append(
                "documents: the first one is in Qwen's prompt template and the query is not, so all are read as text; "
                "send the bare documents"
            )
        return query, instruction, documents
    inner_instruction, inner_query = wrapped
    if not inner_query.strip():
        raise InvalidRequestError("query: must not be empty inside the template")
    bare = list(map(unwrap_document, documents))
    changed = sum(text != document for text, document in zip(bare, documents, strict=True))
    some = "the query and some documents" if changed else "the query"
    report.warnings.append(
        f"query: Qwen's prompt template was taken off {'query and documents' if changed == len(documents) else some}; "
        "send the bare texts" + ("; the instruction inside it is not read beside the request's" if instruction else "")
    )
    return inner_query, instruction or inner_instruction or None, bare
