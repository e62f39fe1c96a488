"""Lines of text and JSON, read and written, with errors that name their place."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from reranker.errors import FailedError, InputError, InvalidRequestError
from reranker.request.objects import object_of


def decode(
    raw: bytes, where: str, *, first: bool, encoding: str = "utf-8", advice: Callable[[bytes, str], str] | None = None
) -> str:
    """Return a line as text without its end; the first one of a file without a byte order mark.

    Raises:
        InputError: it is in another encoding (`advice` returns how to read it), or binary; begins with `where`.
    """
    try:
        text = raw.decode(encoding).rstrip("\r\n")
    except UnicodeDecodeError as error:
        fix = advice(raw, encoding) if advice else "save the file as UTF-8"
        raise InputError(f"{where} is not {encoding.upper()} at byte {error.start}; {fix}") from None
    if "\0" in text:
        raise InputError(f"{where} holds a NUL byte")
    return text.removeprefix("\ufeff") if first else text


def parse(text: str, where: str) -> Any:
    """Return the JSON value of a text.

    Raises:
        InputError: it is not JSON, or a name is in one object twice.
    """

    def refuse(constant: str) -> NoReturn:
        raise InputError(f"{where}: {constant} is not JSON")

    try:
        return json.loads(text, parse_constant=refuse, object_pairs_hook=object_of)
    except InvalidRequestError as error:
        raise InputError(f"{where}: {error}") from None
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise InputError(f"{where} is not JSON: {error.msg.removesuffix(' at')} at {place}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deep") from None
    except ValueError:  # the only other one: an integer of thousands of digits
        raise InputError(f"{where} holds a number with too many digits") from None


def dump(value: object) -> bytes:
    """Return a value as a line of JSON: UTF-8, or escaped if it contains a lone surrogate."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode() + b"\n"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn an OSError in the block into a FailedError that names `path`."""
    try:
        yield
    except OSError as error:
        raise FailedError(f"cannot write {path}: {error.strerror or error}") from None
