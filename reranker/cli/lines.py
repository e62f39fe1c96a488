"""Text files by line, JSON by line: every error names the file and the line."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

from reranker.cli.errors import FailedError, InputError


@contextmanager
def opened(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to read, or standard input for `-`.

    Raises:
        InputError: it cannot be opened.
    """
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below; the caller's own errors must pass unchanged
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    with file:
        yield file


def texts(file: IO[bytes], name: str | Path) -> Iterator[tuple[int, str]]:
    """Line number (from 1) and text of each line that is not blank.

    Raises:
        InputError: a line is not UTF-8.
    """
    try:
        for number, raw in enumerate(file, 1):
            line = decode(raw, f"{name} line {number}", first=number == 1)
            if line.strip():
                yield number, line
    except OSError as error:
        raise InputError(f"cannot read {name}: {error.strerror}") from None


def decode(raw: bytes, where: str, *, first: bool) -> str:
    """A line without its end; the first one without a byte order mark.

    Raises:
        InputError: it is not UTF-8.
    """
    try:
        return raw.decode("utf-8-sig" if first else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 at byte {error.start}; convert the file first") from None


def parse(line: str, where: str) -> Any:
    """A line's JSON value.

    Raises:
        InputError: it is not JSON.
    """

    def refuse(constant: str) -> NoReturn:
        raise InputError(f"{where}: {constant} is not JSON")

    try:
        return json.loads(line, parse_constant=refuse)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deep") from None
    except ValueError:  # the one left: an integer of thousands of digits
        raise InputError(f"{where} holds a number with too many digits") from None


def dump(value: object) -> bytes:
    """A value as a line of JSON; readable, unless it holds half a surrogate pair."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False).encode() + b"\n"


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """What is done inside writes `path`.

    Raises:
        FailedError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise FailedError(f"cannot write {path}: {error.strerror or error}") from None
