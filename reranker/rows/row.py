"""A row of a batch, from JSON lines or from any other source. It means the same as the body of a request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reranker.errors import InputError, InvalidRequestError
from reranker.request.fields import FIELDS, json_kind
from reranker.request.parse import ParsedRequest, parse_request
from reranker.request.unread import TEMPLATE_VALUES
from reranker.types import RerankRequest

COLUMNS = ("id", "document", *FIELDS, TEMPLATE_VALUES)
"""All names that a row may have."""


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A row that can be ranked."""

    request: RerankRequest
    top_k: int | None
    """How many results it wants; None: all."""
    warnings: tuple[str, ...] = ()
    """See `ParsedRequest.warnings`."""


def request_of(body: Any, top_k: int | None, instruction: str | None) -> ParsedRow:
    """Read a row; the fields are those of the service, and `id`.

    Args:
        body: the row as JSON gives it.
        top_k: used where the row does not say.
        instruction: used where the row does not say.

    Raises:
        InputError: the row cannot be ranked.
    """
    if not isinstance(body, dict):
        raise InputError(f"must be an object with query and documents; got {json_kind(body)}")
    try:
        parsed = parse_request({name: value for name, value in body.items() if name != "id"})
    except InvalidRequestError as error:
        raise InputError(str(error)) from None
    request = parsed.request
    if request.instruction is None and instruction:
        request = replace(request, instruction=instruction)
    return ParsedRow(request, parsed.limit or top_k, parsed.warnings + _not_in_a_batch(parsed))


def pair_of(body: Mapping[str, Any], instruction: str | None) -> ParsedRow:
    """Read a row that has one `document` in the place of `documents`.

    Raises:
        InputError: the row cannot be scored.
    """
    rest = {name: value for name, value in body.items() if name != "document"}
    try:
        row = request_of(rest | {"documents": [body["document"]]}, None, instruction)
    except InputError as error:
        raise InputError(str(error).replace("documents[0]", "document")) from None
    warnings = [text.replace("documents: ", "document: ") for text in row.warnings]
    if row.top_k:
        warnings.append("top_k and top_n are not read beside document: its result is one score")
    return replace(row, top_k=None, warnings=tuple(warnings))


def _not_in_a_batch(parsed: ParsedRequest) -> tuple[str, ...]:
    """Warn of fields that change the form of an answer: a batch has one form."""
    notes = []
    if parsed.return_documents:
        notes.append("return_documents is not read in a batch: its results name documents by index")
    if parsed.raw_scores:
        notes.append("raw_scores and use_activation are not read in a batch: its scores are probabilities")
    return tuple(notes)
