"""A row of a batch in the engine's words: JSON lines here, and rows of any source for who reads others."""

from __future__ import annotations

from typing import Any

from reranker.cli.errors import InputError
from reranker.types import RerankRequest


def request_of(body: Any, top_k: int | None, instruction: str | None) -> tuple[RerankRequest, int | None]:
    """The request of a row, and how many results it wants; the field names are those of the service.

    Args:
        body: the row as JSON gives it.
        top_k: where the row does not say.
        instruction: where the row does not say.

    Raises:
        InputError: the row cannot be ranked.
    """
    if not isinstance(body, dict):
        raise InputError("not an object with query and documents")
    query, documents = body.get("query"), body.get("documents")
    if not isinstance(query, str) or not query.strip():
        raise InputError("query must be a string that is not empty")
    if not isinstance(documents, list) or not documents:
        raise InputError("documents must be a list of at least one")
    found = [_text(document, f"documents[{i}]") for i, document in enumerate(documents)]
    top_k = next((body[key] for key in ("top_k", "top_n") if body.get(key) is not None), top_k)
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError("top_k must be a whole number of at least 1")
    return RerankRequest(query, found, _instruction(body, instruction)), top_k


def pair_of(body: dict[str, Any], instruction: str | None) -> RerankRequest:
    """The request of a row that has one `document` in the place of `documents`.

    Raises:
        InputError: the row cannot be scored.
    """
    text = _text(body["document"], "document")
    request, _ = request_of({"query": body.get("query"), "documents": [text]}, None, _instruction(body, instruction))
    return request


def _text(document: Any, name: str) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise InputError(f'{name} must be a string or an object with a string "text"')
    return text


def _instruction(body: dict[str, Any], default: str | None) -> str | None:
    found = next((body[key] for key in ("instruction", "instruct") if body.get(key) is not None), default)
    if found is not None and not isinstance(found, str):
        raise InputError("instruction must be a string")
    return found
