"""Reading a JSON body: bytes to an object, with errors that say what and where and never echo the input.

`reranker.request.parse` reads the fields of the object.
"""

from __future__ import annotations

import gc
import json
from typing import Any, NoReturn

from fastapi import Request

from reranker.errors import InvalidRequestError, MalformedBodyError, UnsupportedMediaTypeError
from reranker.request.fields import json_kind

_SEPARATORS = b",", b"[", b"{"
"""Each value but the first stands behind one of these."""
_PIECE = 1 << 16


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        UnsupportedMediaTypeError: another content type than JSON, or none in a request of a web page.
        MalformedBodyError: not JSON.
        InvalidRequestError: JSON, but not an object, or with NaN or Infinity, or with too many values.
    """
    declared = request.headers.get("content-type")
    if declared is None:  # a browser sends a body without a type to any service, and asks for no preflight
        declared = "" if "origin" in request.headers else "application/json"
    kind = declared.partition(";")[0].strip().lower()
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
        raise MalformedBodyError(
            f"the body is not UTF-8 at byte {error.start}: send UTF-8 (on Windows: chcp 65001, or --data-binary @file "
            f"saved as UTF-8)"
        ) from None
    except RecursionError:
        raise MalformedBodyError("the body is nested too deep") from None
    except json.JSONDecodeError as error:
        if not content.strip():
            raise MalformedBodyError("the body is empty: send a JSON object with query and documents") from None
        reason = error.msg.removesuffix(" at")
        raise MalformedBodyError(
            f"the body is not JSON: {reason} at line {error.lineno} column {error.colno}"
        ) from None
    except ValueError:  # the one left: an integer of thousands of digits
        raise MalformedBodyError("the body holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f'the body must be a JSON object, such as {{"query": "a", "documents": ["b", "c"]}}; got {json_kind(value)}'
        )
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
