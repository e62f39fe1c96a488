"""Reading a request: bytes to a checked `ParsedRequest`. Errors give cause and place and never echo the input."""

from __future__ import annotations

import gc
import json
import logging
import re
from dataclasses import replace
from typing import Any, NoReturn

from starlette.datastructures import Headers
from starlette.requests import Request

from reranker.errors import InvalidRequestError, MalformedBodyError, UnsupportedMediaTypeError
from reranker.http.dialects.route import Parse
from reranker.notes import Notes
from reranker.request.fields import json_kind
from reranker.request.objects import object_of
from reranker.request.parse import ParsedRequest
from reranker.request.unread import MAX_NAMES

_SEPARATORS = b",", b"[", b"{"
"""Each JSON value but the first one follows one of these."""
_PIECE = 1 << 16
"""Bytes that are split at quotes in one step."""
_URL_PARAMETER = re.compile(rb"[A-Za-z_][A-Za-z0-9_-]{0,39}")
_notes = Notes(logging.getLogger(__name__).warning)
"""The operator's copy of the warnings that clients find in their responses; once per process and text."""


async def read(request: Request, parse: Parse, *, max_documents: int, max_values: int) -> ParsedRequest:
    """Read and check the body and the URL parameters of a request.

    The JSON values are dropped on return: unread fields may be larger than the request, which may stay queued.

    Raises:
        UnsupportedMediaTypeError: the content type is not JSON, or a web page sent none.
        MalformedBodyError: not JSON.
        InvalidRequestError: more than `max_values` JSON values, not an object, a name twice, or a field is wrong.
    """
    _check_media_type(request.headers)
    # Not request.body(): the request would keep these bytes until its response.
    content = b"".join([part async for part in request.stream()])
    parsed = parse(_json_object(content, max_values), max_documents=max_documents)
    if query_string := request.scope.get("query_string"):
        parsed = _with_url_parameters(parsed, query_string)
    if parsed.warnings:
        _notes.add(parsed.warnings, "in a request (noted once): ")
    return parsed


def _check_media_type(headers: Headers) -> None:
    declared = headers.get("content-type")
    if declared is None:  # browsers send a body without a type to other origins, without a preflight
        declared = "" if "origin" in headers else "application/json"
    kind = declared.partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise UnsupportedMediaTypeError("the body must be JSON: send the header 'Content-Type: application/json'")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaTypeError("Content-Encoding is not supported: send the JSON uncompressed")


def _json_object(content: bytes, max_values: int) -> dict[str, Any]:
    if exceeds_values(content, max_values):
        raise InvalidRequestError(f"the body holds more than {max_values} JSON values: leave out unread fields")
    try:
        value = _decode(content.decode("utf-8-sig"))
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
    except ValueError:  # the only other one: Python's limit on the digits of an integer
        raise MalformedBodyError("the body holds a number with too many digits") from None
    if not isinstance(value, dict):
        raise InvalidRequestError(
            f'the body must be a JSON object, such as {{"query": "a", "documents": ["b", "c"]}}; got {json_kind(value)}'
        )
    return value


def exceeds_values(content: bytes, limit: int) -> bool:
    """Whether JSON holds more than `limit` values, before any of them is created.

    In memory a value takes up to thirty times its bytes, and creating it blocks the event loop. Separators inside
    strings do not count. For bytes that are not JSON the result is arbitrary.
    """
    if len(content) < limit or sum(map(content.count, _SEPARATORS)) < limit:
        return False
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    values, in_string = 0, False
    for start in range(0, len(unescaped), _PIECE):
        parts = unescaped[start : start + _PIECE].split(b'"')
        outside = b'"'.join(parts[in_string::2])
        values += sum(map(outside.count, _SEPARATORS)) - outside.count(b"[]") - outside.count(b"{}")
        if values >= limit:
            return True
        in_string ^= len(parts) % 2 == 0
    return False


def _decode(text: str) -> Any:
    """Decode JSON with the garbage collector off, which would scan millions of new lists repeatedly."""
    gc.disable()
    try:
        return _JSON.decode(text)
    finally:
        gc.enable()


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidRequestError(f"{name} is not JSON: send null or a number")


_JSON = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=object_of)


def _with_url_parameters(parsed: ParsedRequest, query_string: bytes) -> ParsedRequest:
    """Report the parameters of the URL, of which only the token is read. A name may contain a misplaced token."""
    parts = (part.partition(b"=") for part in query_string.split(b"&", MAX_NAMES)[:MAX_NAMES])
    names = dict.fromkeys(name.decode() for name, equals, _ in parts if equals and _URL_PARAMETER.fullmatch(name))
    capacity = max(0, MAX_NAMES - len(parsed.ignored))
    unread = tuple(name for name in names if "token" not in name.lower())[:capacity]
    warnings = tuple(f"{name} in the address is not read: send it in the body" for name in unread)
    return replace(parsed, ignored=parsed.ignored + unread, warnings=parsed.warnings + warnings)
