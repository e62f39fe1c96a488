"""The input cut into parts: a file and a range of it. The same input gives the same parts, whatever the cluster is.

So a part is what is done or not done when a batch is continued. Every file is read once for it, because only its bytes
tell whether it is still the same, and only its line ends give a line its number. That is little beside scoring it.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import pyarrow
import pyarrow.parquet

from reranker.batch import store
from reranker.errors import InputError

ENDINGS = (".jsonl", ".ndjson", ".parquet")
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one file that are scored, written and recorded together."""

    number: int
    """Its place among all parts, from 0; names its files."""
    address: str
    file: str
    """The file's name in results: its path below the folder that holds all inputs."""
    start: int
    stop: int
    """Bytes of a JSONL file, rows of a Parquet file, `stop` exclusive."""
    first: int
    """Number of its first line or row in the file, from 1."""

    @property
    def parquet(self) -> bool:
        """Whether its file is Parquet; else it is JSON lines."""
        return self.address.endswith(".parquet")

    @property
    def place(self) -> str:
        """Where it begins in its file."""
        return f"{'row' if self.parquet else 'line'} {self.first}"

    @property
    def name(self) -> str:
        """Its number as it stands in names of files."""
        return f"{self.number:06d}"


@dataclass(frozen=True, slots=True)
class Scan:
    """What reading a file told."""

    digest: str
    """SHA-256 of its bytes."""
    cuts: list[tuple[int, int, int]]
    """Start, stop and number of the first line or row of each part."""


def scan(address: str, size: int) -> Scan:
    """Read a whole file, in constant memory, and cut it into parts of about `size` bytes of rows.

    Raises:
        InputError: it cannot be read, or has not the columns of a batch.
    """
    digest = hashlib.sha256()
    with store.opened(address) as file:
        chunks = _chunks(file, digest)
        if not address.endswith(".parquet"):
            cuts = list(_cut_lines(chunks, size))
            return Scan(digest.hexdigest(), cuts)
        for _ in chunks:
            pass
        file.seek(0)
        return Scan(digest.hexdigest(), list(_cut_rows(pyarrow.parquet.ParquetFile(file), address, size)))


def _chunks(file: IO[bytes], digest: hashlib._Hash) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        yield chunk


def _cut_lines(chunks: Iterator[bytes], size: int) -> Iterator[tuple[int, int, int]]:
    """Cuts behind the first line end at or after every `size` bytes; holds no line, so none is too long."""
    start = position = 0
    first = line = 1
    for chunk in chunks:
        at = 0
        while (end := chunk.find(b"\n", max(start + size - 1 - position, at))) >= 0:
            line += chunk.count(b"\n", at, end + 1)
            at = end + 1
            yield start, position + at, first
            start, first = position + at, line
        line += chunk.count(b"\n", at)
        position += len(chunk)
    if position > start:
        yield start, position, first


def _cut_rows(file: pyarrow.parquet.ParquetFile, address: str, size: int) -> Iterator[tuple[int, int, int]]:
    """Small row groups together, large ones in equal shares; sizes are those that the footer tells."""
    _check(file.schema_arrow, address)
    start = stop = taken = 0
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        if taken and taken + group.total_byte_size > size:
            yield start, stop, start + 1
            start, taken = stop, 0
        rows, shares = group.num_rows, -(-group.total_byte_size // size)
        for share in range(1, min(shares, rows)):
            end = stop + rows * share // min(shares, rows)
            yield start, end, start + 1
            start = end
        stop += rows
        taken += group.total_byte_size
        if shares > 1:
            yield start, stop, start + 1
            start, taken = stop, 0
    if stop > start:
        yield start, stop, start + 1


def _check(schema: pyarrow.Schema, address: str) -> None:
    names = set(schema.names)
    if "query" not in names or not names & {"documents", "texts", "document"}:
        raise InputError(
            f"{address} has the columns {', '.join(schema.names)}; a batch needs query and documents, or query and "
            f"document: rename them"
        )
    if "id" in names:
        kind = schema.field("id").type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not any(fits(kind) for fits in _ID_TYPES):
            raise InputError(f"{address}: the column id is of type {kind}; make it a string or a whole number")


_ID_TYPES = (
    pyarrow.types.is_string,
    pyarrow.types.is_large_string,
    pyarrow.types.is_string_view,
    pyarrow.types.is_integer,
    pyarrow.types.is_null,
)


def cut(scans: dict[str, Scan]) -> list[Part]:
    """The parts of all files (by address), in order."""
    folder = posixpath.commonpath([posixpath.dirname(address) for address in scans])
    found = [(address, cut) for address in sorted(scans) for cut in scans[address].cuts]
    return [
        Part(i, address, posixpath.relpath(address, folder), start, stop, first)
        for i, (address, (start, stop, first)) in enumerate(found)
    ]
