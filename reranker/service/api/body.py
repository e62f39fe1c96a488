"""Reading a JSON body: bytes to a checked model, with errors that say what and where and never echo the input."""

from __future__ import annotations

import json
from typing import Annotated, Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, FailFast, Field, ValidationError, WithJsonSchema
from pydantic_core import PydanticCustomError

from reranker.engine.text import printable
from reranker.errors import InvalidRequestError, MalformedBodyError, UnsupportedMediaTypeError

M = TypeVar("M", bound=BaseModel)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise PydanticCustomError("text", "must be a string")
    return printable(value)


def _query(value: Any) -> str:
    text = _text(value)
    if not text.strip():
        raise PydanticCustomError("query", "must not be empty")
    return text


def _document(value: Any) -> str:
    if isinstance(value, dict):
        value = value.get("text")
    if not isinstance(value, str):
        raise PydanticCustomError("document", 'must be a string or an object with a string "text"')
    return printable(value)


def _count(value: Any) -> int | None:
    if value is None:
        return None
    # JSON knows no integers, only numbers without a fraction: 3.0 and 1e20 are as good as 3.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise PydanticCustomError("count", "must be a whole number of at least 1, or null")
    return value


Text = Annotated[str, BeforeValidator(_text)]
Query = Annotated[str, BeforeValidator(_query), WithJsonSchema({"type": "string", "minLength": 1})]
Document = Annotated[
    str,
    BeforeValidator(_document),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]},
            ]
        }
    ),
]
Documents = Annotated[list[Document], FailFast(), Field(min_length=1)]
"""Strings or objects with a text. The most that one request may have is a setting: the endpoint checks it."""
Count = Annotated[
    int | None,
    BeforeValidator(_count),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "null"}]}),
]


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        UnsupportedMediaTypeError: another content type than JSON.
        MalformedBodyError: not JSON.
        InvalidRequestError: JSON, but not an object, or with NaN or Infinity.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaTypeError("the body must be JSON: send the header 'Content-Type: application/json'")
    try:
        value = json.loads((await request.body()).decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise MalformedBodyError(f"the body is not UTF-8 at byte {error.start}") from None
    except RecursionError:
        raise MalformedBodyError("the body is nested too deep") from None
    except json.JSONDecodeError as error:
        raise MalformedBodyError(
            f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}"
        ) from None
    except ValueError:  # the one left: an integer of thousands of digits
        raise MalformedBodyError("the body holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequestError("the body must be a JSON object with query and documents")
    return value


def parse(model: type[M], body: dict[str, Any]) -> M:
    """Check a body against a dialect's model.

    Raises:
        InvalidRequestError: names the first field that is wrong.
    """
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        message = "is required" if problem["type"] == "missing" else problem["msg"]
        raise InvalidRequestError(f"{where}: {message}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not JSON: send null or a number")
