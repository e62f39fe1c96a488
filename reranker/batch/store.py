"""Files on the local disk or on any store of fsspec, by one kind of address: a path, or `s3://bucket/key`."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any

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
            names = [
                name
                for name in fs.find(path)
                if name.endswith(endings) and not re.search(r"(^|/)[_.]", os.path.relpath(name, path))
            ]
        elif fs.isfile(path):
            names = [path]
        else:
            names = [name for name in fs.glob(path) if fs.isfile(name)] if set("*?[") & set(path) else []
        if not names:
            raise InputError(f"{address}: no such file, and no folder or pattern with {' or '.join(endings)} files")
        return [str(fs.unstrip_protocol(name)) for name in names]


def inside(address: str, folder: str) -> bool:
    """Return whether an address is a folder or lies in it."""
    inner, outer = (str(fs.unstrip_protocol(path)).rstrip("/") for fs, path in map(url_to_fs, (address, folder)))
    return f"{inner}/".startswith(f"{outer}/")


@contextmanager
def opened(address: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; see `reaching` for errors."""
    with reaching(address, "read"):
        fs, path = url_to_fs(address)
        with fs.open(path, "rb") as file:
            yield file


@contextmanager
def reaching(address: str, verb: str) -> Iterator[None]:
    """Turn any error of a store inside into one line that names `address`; `verb` is read or write.

    Raises:
        InputError, FailedError: the address cannot be read; it cannot be written.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # every store raises its own exceptions, for the same few causes
        reason = str(getattr(error, "strerror", None) or error).strip().splitlines() or [""]
        kind = InputError if verb == "read" else FailedError
        raise kind(f"cannot {verb} {address}: {reason[0] or type(error).__name__}") from error


class Folder:
    """A folder that several processes write; each file in it is complete or absent. Errors: see `reaching`.

    A rename ensures that on the local disk, and an object store shows no object before its last byte. On other stores a
    killed process may leave half a file.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        with reaching(address, "write"):
            self.fs, self.path = url_to_fs(self.address)
        self.local = isinstance(self.fs, LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (str(self.fs.unstrip_protocol(self.path)),)  # actors have another working directory

    def names(self, below: str = "") -> set[str]:
        """Return the names of the files directly in the folder, or directly in one below it."""
        folder = f"{self.path}/{below}".rstrip("/")
        with reaching(f"{self.address}/{below}", "read"):
            self.fs.invalidate_cache()
            if not self.fs.isdir(folder):
                return set()
            return {name.rpartition("/")[2] for name in self.fs.ls(folder, detail=False)}

    def read(self, name: str) -> bytes | None:
        """Return the content of a file; None: there is no such file."""
        with reaching(f"{self.address}/{name}", "read"):
            try:
                content: bytes = self.fs.cat_file(f"{self.path}/{name}")
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, data: bytes) -> None:
        """Create or replace a file."""
        path = f"{self.path}/{name}"
        with reaching(f"{self.address}/{name}", "write"):
            self.fs.makedirs(path.rpartition("/")[0], exist_ok=True)
            if not self.local:
                self.fs.pipe_file(path, data)
                return
            draft = f"{self.path}/{DRAFT}{uuid.uuid4().hex}"
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

    def remove(self, names: Sequence[str]) -> None:
        """Delete those of the files that exist."""
        with reaching(self.address, "write"):
            for name in names:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self.path}/{name}")
