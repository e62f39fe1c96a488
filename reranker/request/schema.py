"""The JSON Schema of a request body, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from reranker.request.fields import COUNTS, DOCUMENT, FIELDS, OPTIONAL
from reranker.request.parse import INSTRUCTIONS
from reranker.request.unread import TEMPLATE_VALUES


def options(*without: str) -> dict[str, Any]:
    """Return the schema of each field that is not required, except some, by name."""
    properties = {name: FIELDS[name].schema for name in OPTIONAL if name not in without}
    properties[TEMPLATE_VALUES] = {
        "description": "Of an object, instruction and instruct are read where the request has neither, as vLLM does",
        "properties": {name: FIELDS[name].schema for name in INSTRUCTIONS},
    }
    return properties


def no_zero(*without: str) -> dict[str, Any]:
    """Return the rule that 0 means "not set" beside a model and is an error otherwise, for all counts except some."""
    zero = {"not": {"enum": [0, "0"]}}
    return {
        "if": {"required": ["model"], "properties": {"model": {"type": "string"}}},
        "else": {"properties": {name: zero for name in COUNTS if name not in without}},
    }


RANK_FIELDS: dict[str, Any] = {
    "required": ["rank_fields"],
    "properties": {"rank_fields": {"type": "array", "minItems": 1}},
}
"""The condition under which documents may be objects without a text."""


def json_schema(documents: str) -> dict[str, Any]:
    """Return the JSON Schema of a request with its documents in the field `documents` or `texts`.

    JSON Schema cannot express one rule: object documents have the fields that `rank_fields` names.
    """
    properties = {name: FIELDS[name].schema for name in ("query", documents)} | options()
    if documents == "documents":
        properties["texts"] = {"type": "null"}
    return {
        "title": "TeiBody" if documents == "texts" else "RerankBody",
        "description": f"Rank `{documents}` by relevance to `query`. A null counts as absent, and so does an empty "
        "string in a field that is not required. Fields that are not read are named in the header x-ignored-fields.",
        "type": "object",
        "required": ["query", documents],
        "properties": properties,
        "allOf": [
            no_zero(),
            {"if": RANK_FIELDS, "else": {"properties": {documents: {"items": DOCUMENT}}}},
        ],
    }
