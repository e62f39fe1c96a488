"""Reading a JSON body: bytes to a checked model, with errors that say what and where and never echo the input.

The fields that every dialect shares are here, under every name that a client gives them; a dialect's own module holds
what only it has.
"""

from __future__ import annotations

import gc
import json
from typing import Annotated, Any, NoReturn, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError

from reranker.engine.text import printable
from reranker.errors import InvalidRequestError, MalformedBodyError, UnsupportedMediaTypeError
from reranker.types import RerankRequest

M = TypeVar("M", bound=BaseModel)

_SEPARATORS = b",", b"[", b"{"
"""Each value but the first stands behind one of these."""
_PIECE = 1 << 16


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


# RAGFlow sends "true"; Python's str() makes "True"; 1 equals True as a key.
_FLAGS: dict[float | str, bool] = {
    flag: value for value in (True, False) for flag in (value, str(value), str(value).lower(), str(int(value)))
}


def _flag(value: Any) -> bool:
    flag = _FLAGS.get(value) if isinstance(value, (int, float, str)) else None
    if flag is None:
        raise PydanticCustomError("flag", "must be true or false")
    return flag


Text = Annotated[str, BeforeValidator(_text)]
Query = Annotated[str, BeforeValidator(_query), WithJsonSchema({"type": "string", "minLength": 1, "pattern": r"\S"})]
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
"""None: not limited."""
Flag = Annotated[
    bool,
    BeforeValidator(_flag),
    WithJsonSchema(
        {"anyOf": [{"type": "boolean"}, {"enum": ["true", "false", "True", "False", "1", "0", 1, 0, None]}]}
    ),
]


class RerankBody(BaseModel):
    """Rank `documents` by relevance to `query`. Unknown keys and nulls are ignored."""

    model_config = ConfigDict(extra="ignore")

    query: Query = Field(description="What is searched for", examples=["what is a cat?"])
    documents: Documents = Field(
        description='Strings, or objects {"text": string}', examples=[["a small animal", "a bread"]]
    )
    top_k: Count = Field(None, description="How many results; null: all")
    top_n: Count = Field(None, description="The same as top_k, which goes first")
    instruction: Text | None = Field(None, description="Replaces the default instruction")
    instruct: Text | None = Field(None, description="The same as instruction, which goes first")
    return_documents: Flag = Field(False, description="Answer the texts as well")
    return_text: Flag = Field(False, description="The same as return_documents")
    max_tokens_per_doc: Count = Field(None, description="Tokens of a document that are read at once; null: what fits")
    max_chunks_per_doc: Count = Field(
        None,
        description="A longer document is split into up to so many chunks (at most 64) and counts by its best; "
        "null: it is cut",
    )
    raw_scores: Flag = Field(False, description="Answer logits instead of probabilities")
    truncate: Flag = Field(True, description="false: a document that does not fit is an error instead of cut")
    model: Text | None = Field(None, description="Any string; the answer names the model that is served")

    @property
    def limit(self) -> int | None:
        """How many results are asked for; None: all."""
        return self.top_n if self.top_k is None else self.top_k

    @property
    def wants_documents(self) -> bool:
        """Are the texts answered as well."""
        return self.return_documents or self.return_text

    def request(self) -> RerankRequest:
        """The request in the engine's words."""
        return RerankRequest(
            self.query,
            self.documents,
            self.instruction or self.instruct or None,  # many pages send "" for "none"
            self.max_tokens_per_doc,
            self.max_chunks_per_doc,
            self.truncate,
        )


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        UnsupportedMediaTypeError: another content type than JSON.
        MalformedBodyError: not JSON.
        InvalidRequestError: JSON, but not an object, or with NaN or Infinity, or with too many values.
    """
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaTypeError("the body must be JSON: send the header 'Content-Type: application/json'")
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Content-Encoding is not supported: send the JSON uncompressed")
    # Not request.body(), which keeps the bytes as long as the request waits.
    content = b"".join([part async for part in request.stream()])
    most: int = request.app.state.max_values
    if more_values(content, most):
        raise InvalidRequestError(f"the body holds more than {most} values: leave out what is not asked for")
    try:
        value = _loads(content.decode("utf-8-sig"))
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


def more_values(content: bytes, most: int) -> bool:
    """Whether JSON has more than so many values: in memory each takes up to thirty times its bytes, and the event loop
    waits while they are made. Texts may hold whatever they like. What is no JSON may have more, or not.
    """
    if len(content) < most or sum(map(content.count, _SEPARATORS)) < most:
        return False
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    values, in_text = 0, False
    for start in range(0, len(unescaped), _PIECE):
        parts = unescaped[start : start + _PIECE].split(b'"')
        outside = b'"'.join(parts[in_text::2])
        values += sum(map(outside.count, _SEPARATORS)) - outside.count(b"[]") - outside.count(b"{}")
        if values >= most:
            return True
        in_text ^= len(parts) % 2 == 0
    return False


def parse(model: type[M], body: dict[str, Any]) -> M:
    """Check a body against a dialect's model.

    Raises:
        InvalidRequestError: names the first field that is wrong.
    """
    try:
        return model.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"]).lstrip(".")
        message = "is required" if problem["type"] == "missing" else problem["msg"]
        raise InvalidRequestError(f"{where}: {message}") from None


def _loads(text: str) -> Any:
    """JSON to values, with the garbage collector off: it looks through millions of new lists again and again."""
    gc.disable()
    try:
        return _JSON.decode(text)
    finally:
        gc.enable()


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not JSON: send null or a number")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant)
