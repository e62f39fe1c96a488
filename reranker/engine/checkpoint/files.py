"""Read the text files of a checkpoint, and refuse what cannot be served; the advice that several refusals share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from reranker.errors import ModelLoadError

AGAIN = "download the checkpoint again"
ORIGINAL = "use the original weights"
UNQUANTIZED = f"{ORIGINAL}, and MODEL_PRECISION=int8"
RERANKER = "gives no relevance: use a reranker (docs/models.md)"
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


def refuse_if(condition: object, message: str) -> None:
    """Raise ModelLoadError with the message if the condition is true."""
    if condition:
        raise ModelLoadError(message)


def refuse_pointer(file: Path, content: bytes) -> None:
    """Refuse the pointer that git writes in place of a large file where git-lfs is not installed."""
    pointer = content.startswith(b"version https://git-lfs")
    refuse_if(pointer, f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull`, or {AGAIN}")


def first_line(error: BaseException) -> str:
    """Return a library's error message on one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:200]


def read_text(file: Path) -> str:
    """Read a file that must be UTF-8 without a byte order mark.

    Raises:
        ModelLoadError: it is not, or cannot be read.
    """
    try:
        content = file.read_bytes()
        refuse_pointer(file, content)
        marked = content.startswith(_BYTE_ORDER_MARKS)
        refuse_if(marked, f"{file} begins with a byte order mark: save it as UTF-8 without one")
        return content.decode()
    except OSError as error:
        raise ModelLoadError(f"cannot read {file}: {error.strerror}; {AGAIN}") from error
    except UnicodeDecodeError as error:
        raise ModelLoadError(f"{file} is not UTF-8: {AGAIN}") from error


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file that holds an object, or an array where `kind` is list.

    Raises:
        ModelLoadError: it does not, or cannot be read.
    """

    def refuse_constant(name: str) -> NoReturn:
        raise ModelLoadError(f"{file} holds {name}, which is not JSON: {AGAIN}")

    try:
        value = json.loads(read_text(file), parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not JSON: {AGAIN}") from error
    name = "object" if kind is dict else "array"
    refuse_if(not isinstance(value, kind), f"{file} is not a JSON {name}: {AGAIN}")
    return value
