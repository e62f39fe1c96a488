"""Files on the local disk or on any store that fsspec knows, by one address: a path, or `s3://bucket/key`."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from reranker.errors import CommandError, FailedError, InputError

DRAFT = "_draft-"
"""How the name of a file begins that is being written on the local disk."""


def find(address: str, endings: tuple[str, ...]) -> list[str]:
    """The addresses of all files meant by one: itself, what a pattern matches, or what lies below a folder.

    In a folder names that begin with `_` or `.` are not data, as for Spark and Arrow.

    Raises:
        InputError: there are none, or the store cannot be reached.
    """
    with reaching(address, "read"):
        fs, path = url_to_fs(address)
        fs.invalidate_cache()
        if fs.isdir(path):
            found = [
                name
                for name in fs.find(path)
                if name.endswith(endings) and not re.search(r"(^|/)[_.]", os.path.relpath(name, path))
            ]
        elif fs.isfile(path):
            found = [path]
        else:
            found = [name for name in fs.glob(path) if fs.isfile(name)] if set("*?[") & set(path) else []
        if not found:
            raise InputError(f"{address}: no such file, and no folder or pattern with {' or '.join(endings)} files")
        return [str(fs.unstrip_protocol(name)) for name in found]


def inside(address: str, folder: str) -> bool:
    """Whether an address is a folder or lies in it."""
    here, there = (str(fs.unstrip_protocol(path)).rstrip("/") for fs, path in map(url_to_fs, (address, folder)))
    return f"{here}/".startswith(f"{there}/")


@contextmanager
def opened(address: str) -> Iterator[IO[bytes]]:
    """A file to read.

    Raises:
        InputError: it cannot be opened or read.
    """
    with reaching(address, "read"):
        fs, path = url_to_fs(address)
        with fs.open(path, "rb") as file:
            yield file


@contextmanager
def reaching(address: str, what: str) -> Iterator[None]:
    """What is done inside reads or writes `address`.

    Raises:
        InputError, FailedError: it cannot be read; it cannot be written.
    """
    try:
        yield
    except CommandError:
        raise
    except Exception as error:  # every store has its own; all mean the same here
        reason = str(getattr(error, "strerror", None) or error).strip().splitlines() or [""]
        kind = InputError if what == "read" else FailedError
        raise kind(f"cannot {what} {address}: {reason[0] or type(error).__name__}") from error


class Folder:
    """A folder that is written to, by several processes: a file in it is there whole, or not at all.

    The local disk gets it by a rename. An object store shows no object before its last byte. On other stores a process
    that dies may leave half a file.
    """

    def __init__(self, address: str) -> None:
        self.address = address.rstrip("/")
        with reaching(address, "write"):
            self.fs, self.path = url_to_fs(self.address)
        self.local = isinstance(self.fs, LocalFileSystem)

    def __reduce__(self) -> tuple[Any, ...]:
        return Folder, (str(self.fs.unstrip_protocol(self.path)),)  # "out" is another folder where an actor runs

    def names(self, below: str = "") -> set[str]:
        """Names of the files right in the folder, or right in one below it."""
        folder = f"{self.path}/{below}".rstrip("/")
        with reaching(f"{self.address}/{below}", "read"):
            self.fs.invalidate_cache()
            if not self.fs.isdir(folder):
                return set()
            return {name.rpartition("/")[2] for name in self.fs.ls(folder, detail=False)}

    def read(self, names: list[str]) -> list[bytes]:
        """The contents of files that are there, in the same order."""
        if not names:
            return []
        with reaching(self.address, "read"):
            found = self.fs.cat([f"{self.path}/{name}" for name in names])
            return [found[f"{self.path}/{name}"] for name in names]

    def read_if_there(self, name: str) -> bytes | None:
        """The contents of a file, or None."""
        with reaching(f"{self.address}/{name}", "read"):
            try:
                content: bytes = self.fs.cat_file(f"{self.path}/{name}")
            except FileNotFoundError:
                return None
            return content

    def write(self, name: str, data: bytes) -> None:
        """Make a file, or replace it.

        Raises:
            FailedError: the disk is full, or the store refuses.
        """
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
            except BaseException:  # an interrupt too leaves no draft behind
                if os.path.exists(draft):
                    os.unlink(draft)
                raise

    def remove(self, names: list[str]) -> None:
        """Delete files, where they are there."""
        with reaching(self.address, "write"):
            for name in names:
                with suppress(FileNotFoundError):
                    self.fs.rm_file(f"{self.path}/{name}")
