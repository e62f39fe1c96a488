"""Scoring of pairs, as vLLM's score route takes them: one query for all documents, or one query for each document.

Source of the four pairs of names: `ScoreRequest` in vLLM's vllm/entrypoints/pooling/scoring/protocol.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from reranker.errors import InvalidRequestError
from reranker.request.fields import FIELDS, refuse
from reranker.request.names import naming, renamed
from reranker.request.parse import (
    ParsedRequest,
    read_documents,
    read_fields,
    read_instruction,
    read_raw_scores,
    to_request,
    unwrap,
)
from reranker.request.unread import MAX_NAMES, TEMPLATE_VALUES, Report, missing_hint
from reranker.types import RerankRequest

SHAPES = (("queries", "documents"), ("queries", "items"), ("text_1", "text_2"), ("data_1", "data_2"))
"""Names of the queries and of the documents; of several shapes in a body the first is read."""
NOT_READ = ("query", "documents", "texts", "top_k", "top_n", "return_documents", "return_text")
"""Fields of a rerank request without a meaning for pairs: every pair is scored, and no text is returned."""


def parse_pairs(body: Mapping[str, Any], *, max_documents: int | None = None) -> ParsedRequest:
    """Read the queries and documents of a JSON object and the fields that they share with a rerank request.

    Raises:
        InvalidRequestError: a field is wrong, or there are neither one nor as many queries as documents.
    """
    query_name, document_name = _shape(body)
    queries, documents = _texts(query_name, body[query_name]), _texts(document_name, body[document_name], (str, dict))
    if len(queries) not in (1, len(documents)):
        raise InvalidRequestError(
            f"{query_name}: {len(queries)} beside {len(documents)} {document_name}; send one for all of them, or one "
            "for each"
        )
    names = {"query": query_name, "documents": document_name}
    with naming(names):
        return _parse(names, queries, documents, body, max_documents)


def _parse(
    names: Mapping[str, str],
    queries: Sequence[Any],
    documents: list[Any],
    body: Mapping[str, Any],
    max_documents: int | None,
) -> ParsedRequest:
    options = {name: value for name, value in body.items() if name not in names.values()}
    values, unread = read_fields(options, skip=NOT_READ)
    report = Report(unread)
    instruction = read_instruction(values, body.get(TEMPLATE_VALUES), report)
    texts = read_documents(names["documents"], documents, values.get("rank_fields"), max_documents, report)
    positions: dict[str, list[int]] = {}
    for i, query in enumerate(queries):
        where = "query" if len(queries) == 1 else f"query[{i}]"
        positions.setdefault(FIELDS["query"].read(where, query), []).append(i)
    if len(positions) == 1:
        positions = {query: list(range(len(texts))) for query in positions}
    raw_scores = read_raw_scores(values, report)
    by_query = _by_query(positions, values, instruction, texts, report)
    sent = [name for name in NOT_READ if options.get(name) is not None][: max(0, MAX_NAMES - len(report.ignored))]
    return ParsedRequest(
        by_query[0] if len(by_query) == 1 else replace(by_query[0], documents=texts, positions=None),
        limit=None,
        return_documents=False,
        raw_scores=raw_scores,
        has_model="model" in values,
        is_tei=False,
        ignored=(*(renamed(name, names) for name in report.ignored), *sent),
        warnings=(*(renamed(text, names) for text in report.warnings), *(f"{name} is not read here" for name in sent)),
        by_query=tuple(by_query) if len(by_query) > 1 else (),
        names=names,
    )


def _by_query(
    positions: Mapping[str, list[int]],
    values: Mapping[str, Any],
    instruction: str | None,
    texts: Sequence[str],
    report: Report,
) -> list[RerankRequest]:
    """Return one request for each distinct query, so that its documents share one prefix."""
    requests: list[RerankRequest] = []
    warnings: dict[str, None] = {}
    for query, indices in positions.items():
        own = [texts[i] for i in indices]
        where = indices[0] if len(positions) > 1 else None
        if not requests:
            first = to_request({**values, "query": query}, instruction, own, False, report)
            requests.append(replace(first, positions=indices, query_index=where))
            continue
        part = Report(())
        text, prompt, own = unwrap(query, instruction, own, part)
        requests.append(
            replace(first, query=text, instruction=prompt, documents=own, positions=indices, query_index=where)
        )
        warnings |= dict.fromkeys(part.warnings)
    report.warnings += [text for text in warnings if text not in report.warnings]
    return requests


def _shape(body: Mapping[str, Any]) -> tuple[str, str]:
    """Return the names of queries and documents in a body."""
    names = {name for name, value in body.items() if value is not None}
    shape = next((shape for shape in SHAPES if names.issuperset(shape)), None)
    if shape is not None:
        return shape
    begun = next((shape for shape in SHAPES if not names.isdisjoint(shape)), SHAPES[0])
    missing = next(name for name in begun if name not in names)
    raise InvalidRequestError(f"{missing}: is required{missing_hint(missing, names.difference(*SHAPES))}")


def _texts(name: str, value: Any, kinds: tuple[type, ...] = (str,)) -> list[Any]:
    """Return one text or a list of texts as a list."""
    if isinstance(value, kinds):
        return [value]
    if not isinstance(value, list):
        refuse(name, 'must be a text or a list of texts, such as ["a", "b"]', value)
    if not value:
        raise InvalidRequestError(f'{name}: must hold at least one text, such as ["a", "b"]; the list is empty')
    return value
