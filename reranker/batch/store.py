"""Files on the local disk or on any store of fsspec, by one kind of address: a path, or `s3://bucket/key`."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from reranker.errors import CommandError, FailedError, InputError

DRAFT = "_draft-"
"""Start of the name of an unfinished file on the local disk."""


def find(address: str, endings: tuple[str, ...]) -> list[str]:
    """Return the addresses of all files that one address means: a file, matches of a pattern, or files below a folder.

    In a folder, names that begin with `_` or `.` are not data, as for Spark and Arrow.

    Raises:
        InputError: there are none, or the store cannot be reached.
    """
    with reaching(address, "read"):
        fs, path = url_to_fs(address)
        fs.invalidate_cache()
        if fs.isdir(path):
            names = [name for name in fs.find(path) if name.endswith(endings)]
            names = [name for name in names if not re.search(r"(^|/)[_.]", os.path.relpath(name, path))]
        else:  # a name may contain the characters of a pattern
            names = [path] if fs.isfile(path) else [name for name in fs.glob(path) if fs.isfile(name)]
        if not names:
            raise InputError(f"{address}: no such file, and no folder or pattern with {' or '.join(endings)} files")
        return [str(fs.unstrip_protocol(name)) for name in names]


def inside(address: str, folder: str) -> bool:
    """Return whether an address is a folder or lies in it; see `reaching` for errors."""
    with reaching(address, "use"):
        inner, outer = (str(fs.unstrip_protocol(path)).rstrip("/") for fs, path in map(url_to_fs, (address, folder)))
    return f"{inner}/".startswith(f"{outer}/")


@contextmanager
def opened(address: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; see `reaching` for errors."""
    with reaching(address, "read"):
        fs, path = url_to_fs(address)
        with fs.open(path, "rb") as file:
            yield file


def names(folder: str) -> set[str]:
    """Return the names of the files directly in a folder, if it exists; see `reaching` for errors."""
    with reaching(folder, "read"):
        fs, path = url_to_fs(folder)
        fs.invalidate_cache()
        return {name.rpartition("/")[2] for name in fs.ls(path, detail=False)} if fs.isdir(path) else set()


def read(address: str) -> bytes | None:
    """Return the content of a file; None: there is no such file. See `reaching` for errors."""
    content: bytes | None = None
    with reaching(address, "read"), suppress(FileNotFoundError):
        fs, path = url_to_fs(address)
        content = fs.cat_file(path)
    return content


def write(address: str, data: bytes) -> None:
    """Create or replace a file, which is complete or absent at any time; see `reaching` for errors.

    A rename ensures that on the local disk, and an object store shows no object before its last byte. On other stores a
    killed process may leave half a file.
    """
    with reaching(address, "write"):
        fs, path = url_to_fs(address)
        folder = path.rpartition("/")[0]
        fs.makedirs(folder, exist_ok=True)
        if not isinstance(fs, LocalFileSystem):
            fs.pipe_file(path, data)
            return
        draft = f"{folder}/{DRAFT}{uuid.uuid4().hex}"
        try:
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except BaseException:  # an interrupt leaves no draft either
            with suppress(FileNotFoundError):
                os.unlink(draft)
            raise


def remove(folder: str, names: Iterable[str]) -> None:
    """Delete those of the files in a folder that exist; see `reaching` for errors."""
    with reaching(folder, "write"):
        fs, path = url_to_fs(folder)
        for name in names:
            with suppress(FileNotFoundError):
                fs.rm_file(f"{path}/{name}")


@contextmanager
def reaching(address: str, verb: str) -> Iterator[None]:
    """Turn any error of a store inside into one line that names `address`; `verb` is read, write or use.

    Raises:
        InputError, FailedError: the address cannot be read or used; it cannot be written.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # every store raises its own exceptions, for the same few causes
        reason = str(getattr(error, "strerror", None) or error).strip().splitlines() or [""]
        kind = FailedError if verb == "write" else InputError
        raise kind(f"cannot {verb} {address}: {reason[0] or type(error).__name__}") from error
