"""Parts: ranges of input files, how files are split into them, and their records.

The same input has the same parts on every cluster, so a resumed batch can skip the finished ones. Every file is read
once to split it: only its bytes show that it is unchanged, and only its line ends give a line its number.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import IO

import pyarrow
import pyarrow.parquet

from reranker.batch import store
from reranker.batch.scoring import Note
from reranker.errors import InputError
from reranker.rows.inputs import Record
from reranker.rows.lines import decode, parse
from reranker.rows.row import COLUMNS

ENDINGS = (".jsonl", ".ndjson", ".parquet")
_CHUNK = 1 << 20
"""Bytes of a file in memory."""
_MAX_LINE = 64 << 20
"""Bytes of a line; a longer one is an error, and never in memory."""
_ROWS = 128
"""Rows of a Parquet file in memory."""

Range = tuple[int, int, int]
"""Start, stop and number of the first line or row; see `Part`."""


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one file that are scored, written and recorded together."""

    number: int
    """Index among all parts, from 0; names the part's files."""
    address: str
    file: str
    """Name of the file in results: its path below the folder that holds all inputs."""
    start: int
    stop: int
    """Bytes of a JSONL file, rows of a Parquet file, `stop` exclusive."""
    first: int
    """Number of its first line or row in the file, from 1."""

    @property
    def unit(self) -> str:
        """The noun that `first` counts, and its key in results: `row` of Parquet, `line` of JSON lines."""
        return "row" if self.address.endswith(".parquet") else "line"

    @property
    def name(self) -> str:
        """The number as file names have it."""
        return f"{self.number:06d}"


@dataclass(frozen=True, slots=True)
class Scan:
    """The SHA-256 of a file and its ranges."""

    digest: str
    ranges: list[Range]


def scan(address: str, size: int) -> Scan:
    """Read a whole file, in constant memory, and split it into ranges of about `size` bytes of rows.

    Raises:
        InputError: it cannot be read, or lacks columns of a batch.
    """
    with store.opened(address) as file:
        if address.endswith(".parquet"):
            digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]
            file.seek(0)
            ranges = list(_split_rows(pyarrow.parquet.ParquetFile(file), address, size))
        else:
            digest = hashlib.sha256()
            ranges = list(_split_lines(file, digest, size))
    return Scan(digest.hexdigest(), ranges)


def split_into_parts(scans: Mapping[str, Scan]) -> list[Part]:
    """Return the parts of all files (by address), in order."""
    folder = posixpath.commonpath([posixpath.dirname(address) for address in scans])
    number = itertools.count()
    return [
        Part(next(number), address, posixpath.relpath(address, folder), *range_)
        for address in sorted(scans)
        for range_ in scans[address].ranges
    ]


def digest_of(parts: list[Part], scans: Mapping[str, Scan]) -> str:
    """Return the SHA-256 of the names and contents of all files with parts."""
    files = sorted({(part.file, scans[part.address].digest) for part in parts})
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def _split_lines(file: IO[bytes], digest: hashlib._Hash, size: int) -> Iterator[Range]:
    """Split after the first line end at or after every `size` bytes; no line is held, so none is too long."""
    start = position = 0
    first = line = 1
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        offset = 0
        while (end := chunk.find(b"\n", max(start + size - 1 - position, offset))) >= 0:
            line += chunk.count(b"\n", offset, end + 1)
            offset = end + 1
            yield start, position + offset, first
            start, first = position + offset, line
        line += chunk.count(b"\n", offset)
        position += len(chunk)
    if position > start:
        yield start, position, first


def _split_rows(file: pyarrow.parquet.ParquetFile, address: str, size: int) -> Iterator[Range]:
    """Join small row groups, split large ones into equal shares; sizes are those in the footer."""
    _check_columns(file.schema_arrow, address)
    start = stop = joined_bytes = 0
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        if joined_bytes and joined_bytes + group.total_byte_size > size:
            yield start, stop, start + 1
            start, joined_bytes = stop, 0
        rows, shares = group.num_rows, -(-group.total_byte_size // size)
        for share in range(1, min(shares, rows)):
            end = stop + rows * share // min(shares, rows)
            yield start, end, start + 1
            start = end
        stop += rows
        joined_bytes += group.total_byte_size
        if shares > 1:
            yield start, stop, start + 1
            start, joined_bytes = stop, 0
    if stop > start:
        yield start, stop, start + 1


def _check_columns(schema: pyarrow.Schema, address: str) -> None:
    names = set(schema.names)
    if "query" not in names or not names & {"documents", "texts", "document"}:
        fix = "a batch needs query and documents, or query and document: rename them"
        raise InputError(f"{address} has the columns {', '.join(schema.names)}; {fix}")
    if "id" in names:
        kind = schema.field("id").type
        kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
        if not pyarrow.types.is_integer(kind) and str(kind) not in ("string", "large_string", "string_view", "null"):
            raise InputError(f"{address}: the column id is of type {kind}; make it a string or a whole number")


def records(part: Part, note: Note) -> Iterator[Record]:
    """Yield the records of a part without its blank lines; a note names each column that is not read.

    Raises:
        InputError: the file cannot be read.
    """
    with store.opened(part.address) as file:
        yield from _rows(file, part, note) if part.unit == "row" else _lines(file, part)


def _lines(raw_file: IO[bytes], part: Part) -> Iterator[Record]:
    with io.BufferedReader(raw_file, 1 << 20) as file:  # type: ignore[type-var]  # a store's readline takes no limit
        position = file.seek(part.start)
        for number in itertools.count(part.first):
            raw = file.readline(_MAX_LINE) if position < part.stop else b""
            if not raw:
                return
            position += len(raw)
            record = Record(number, f"{part.file} line {number}", position)
            try:
                if len(raw) == _MAX_LINE and not raw.endswith(b"\n"):
                    while not raw.endswith(b"\n") and (raw := file.readline(_MAX_LINE)):
                        position += len(raw)
                    raise InputError(f"this is longer than {_MAX_LINE >> 20} MiB")
                text = decode(raw, "this", first=number == 1)
                if text.strip():
                    yield replace(record, value=parse(text, "this"))
            except InputError as error:
                yield replace(record, error=str(error))


def _rows(file: IO[bytes], part: Part, note: Note) -> Iterator[Record]:
    source = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    sizes = [source.metadata.row_group(i).num_rows for i in range(source.metadata.num_row_groups)]
    ends = list(itertools.accumulate(sizes))
    groups = [i for i, end in enumerate(ends) if end > part.start and end - sizes[i] < part.stop]
    position = ends[groups[0]] - sizes[groups[0]]
    names = source.schema_arrow.names
    note((f"the column {name} is not read" for name in names if name not in COLUMNS), f"{part.file}: ")
    columns = [name for name in COLUMNS if name in names]
    for batch in source.iter_batches(_ROWS, row_groups=groups, columns=columns, use_threads=False):
        start, stop = max(position, part.start), min(position + batch.num_rows, part.stop)
        if start < stop:
            for number, row in enumerate(batch.slice(start - position, stop - start).to_pylist(), start + 1):
                yield Record(number, f"{part.file} row {number}", number, row)
        position += batch.num_rows
        if position >= part.stop:
            return
