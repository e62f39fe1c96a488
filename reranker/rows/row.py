"""A row of a batch: the body of a request with an id, or a pair of one query and one document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from reranker.errors import InvalidRequestError
from reranker.request.fields import FIELDS, json_kind
from reranker.request.parse import parse_request
from reranker.request.unread import TEMPLATE_VALUES
from reranker.rows.inputs import Record
from reranker.types import RerankRequest

COLUMNS = ("id", "document", *FIELDS, TEMPLATE_VALUES)
"""All names that a row may have."""


@dataclass(frozen=True, slots=True)
class Defaults:
    """Options of rows without their own: max results (None: all) and instruction."""

    top_k: int | None = None
    instruction: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """The options under their names in a manifest."""
        return {"top_k": self.top_k, "instruction of requests": self.instruction}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input: a request, or the reason why it has none."""

    number: int
    place: str
    end: int
    """See `Record` for these three."""
    id: Any = None
    request: RerankRequest | None = None
    top_k: int | None = None
    pair: bool = False
    """Whether the row has one `document`; its result is one score."""
    error: str = ""
    """Why `request` is None."""
    warnings: tuple[str, ...] = ()
    """See `ParsedRequest.warnings`."""


def read_row(record: Record, defaults: Defaults) -> Row:
    """Return the row that a record holds; fields mean the same as in the body of a request."""
    body, row = record.value, Row(record.number, record.place, record.end, error=record.error)
    if row.error:
        return row
    try:
        if not isinstance(body, dict):
            raise InvalidRequestError(f"must be an object with query and documents; got {json_kind(body)}")
        row = replace(row, id=body.get("id"))
        is_pair = "document" in body and body.get("documents") is body.get("texts") is None
        return _read_pair(row, body, defaults) if is_pair else _read_list(row, body, defaults)
    except InvalidRequestError as error:
        return replace(row, error=str(error))


def _read_list(row: Row, body: Mapping[str, Any], defaults: Defaults) -> Row:
    parsed = parse_request({name: value for name, value in body.items() if name != "id"})
    request = parsed.request
    if request.instruction is None and defaults.instruction:
        request = replace(request, instruction=defaults.instruction)
    warnings = [*parsed.warnings]
    if parsed.return_documents:
        warnings.append("return_documents is not read in a batch: its results name documents by index")
    if parsed.raw_scores:
        warnings.append("raw_scores and use_activation are not read in a batch: its scores are probabilities")
    return replace(row, request=request, top_k=parsed.limit or defaults.top_k, warnings=tuple(warnings))


def _read_pair(row: Row, body: Mapping[str, Any], defaults: Defaults) -> Row:
    rest = {name: value for name, value in body.items() if name != "document"}
    try:
        single = _read_list(row, rest | {"documents": [body["document"]]}, replace(defaults, top_k=None))
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error).replace("documents[0]", "document")) from None
    warnings = [text.replace("documents: ", "document: ") for text in single.warnings]
    if single.top_k:
        warnings.append("top_k and top_n are not read beside document: its result is one score")
    elif defaults.top_k:
        warnings.append("--top-k has no effect on a row with document: its result is one score")
    return replace(single, top_k=None, pair=True, warnings=tuple(warnings))
