"""An input in any form as a sequence of records, for `rank`, `batch` and `evaluate`."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

from reranker.errors import FailedError, InputError
from reranker.root import INSTALL_EVAL
from reranker.rows.encodings import advice, encoding_name, encoding_of, is_wide
from reranker.rows.forms import HEAD, KINDS, Form, check_bytes, check_text, form_of
from reranker.rows.lines import decode, parse
from reranker.rows.tables import Line, Row, read_csv, read_tsv

_PARQUET_ROWS = 128
"""Rows of a Parquet file in memory at a time."""


@dataclass(frozen=True, slots=True)
class Record:
    """A line, a row of a table or of a Parquet file, or an item of a JSON array."""

    number: int
    """Its line or row, from 1."""
    place: str
    """The same for people, with the line of the file."""
    end: int
    """The part of `Input.total` that is read with it."""
    value: Any = None
    """A text, a JSON value, or the cells by column."""
    error: str = ""
    """The reason why there is no value, as a sentence about `this`."""


class Input:
    """A file or standard input of a known form. `open_input` makes it.

    Attributes:
        name: for error texts.
        form: its form.
        total: bytes of the content, decompressed; the last `Record.end`. Known after `digest`.
        columns: of a table or Parquet file, known with the first record.
    """

    def __init__(self, file: IO[bytes], name: str, form: Form, encoding: str | None, kinds: Sequence[str]) -> None:
        self.name = name
        self.form = form
        self.total = 0
        self.columns: list[str] = []
        self._file = file
        self._given = encoding
        self._kinds = kinds
        self._encoding = "utf-8"
        self._read = 0
        self._started = False
        self._head = ""
        self._ready: IO[bytes] | None = None
        """The content after `first_line`."""

    @property
    def unit(self) -> str:
        """The noun that a record's number counts."""
        return "line" if self.form.kind in ("lines", "jsonl") else "row"

    def check_encoding(self) -> None:
        """Refuse an encoding that was given for Parquet, where it has no effect."""
        if self.form.kind == "parquet" and self._given is not None:
            raise InputError(f"--encoding has no effect: {self.name} is Parquet, always UTF-8; leave it out")

    def digest(self) -> str:
        """Return the SHA-256 of the content, decompressed. For files only: it is read again afterwards.

        Raises:
            InputError: it cannot be read.
        """
        digest = hashlib.sha256()
        with self._reading():
            stream = self._stream()
            while block := stream.read(1 << 20):
                digest.update(block)
                self.total += len(block)
        return digest.hexdigest()

    def records(self) -> Iterator[Record]:
        """Yield all records, without blank lines. The error of one line is its record's.

        Raises:
            InputError: the file cannot be read, or contradicts its form.
        """
        readers = {"parquet": self._parquet, "json": self._json, "csv": self._table, "tsv": self._table}
        with self._reading():
            yield from readers.get(self.form.kind, self._lines)()

    def first_line(self) -> str:
        """Return the first line of a text, without its end; it is read again with the records."""
        with self._reading():
            self._ready = self._checked()
        return self._head.lstrip("\r\n").partition("\n")[0].rstrip("\r")

    def rows(self) -> Iterator[Row]:
        """Yield the cells of a table, the heading first."""
        return (read_csv if self.form.kind == "csv" else read_tsv)(self.texts(), self.name)

    def texts(self) -> Iterator[Line]:
        """Yield numbered lines with their ends, for tables: there a bad line makes the rows after it bad as well."""
        with self._reading():
            for number, raw in self._numbered():
                body = raw.rstrip(b"\r\n")
                text = self._decode(body, number, f"{self.name} line {number}")
                yield number, text + raw[len(body) :].decode("ascii")

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except (gzip.BadGzipFile, zlib.error):
            raise InputError(f"{self.name} is not gzip, or damaged") from None
        except EOFError:
            raise InputError(f"{self.name} is not whole: its compressed data ends too early") from None
        except OSError as error:
            raise InputError(f"cannot read {self.name}: {_first_line(error.strerror or error)}") from None

    def _stream(self) -> IO[bytes]:
        """Return the content from its beginning, decompressed."""
        if self._started:
            self._file.seek(0)
        self._started = True
        return gzip.GzipFile(fileobj=self._file) if self.form.gzipped else self._file  # type: ignore[return-value]

    def _checked(self) -> IO[bytes]:
        """Return the content, checked against the form; UTF-16 becomes UTF-8, so that lines end with the byte 10."""
        if ready := self._ready:
            self._ready = None
            return ready
        stream = self._stream()
        head = stream.read(HEAD)
        check_bytes(head, self.form, self.name)
        if self.form.kind != "parquet":
            self._encoding = encoding_of(head, self._given, self.name)
            if is_wide(self._encoding):
                head, stream = self._recoded(head + stream.read())
            self._head = head.decode(self._encoding, errors="replace").removeprefix("\ufeff")
            check_text(self._head, self.form, self.name, self._kinds)
        return io.BufferedReader(_Rejoined(head, stream), 1 << 20)

    def _recoded(self, content: bytes) -> tuple[bytes, IO[bytes]]:
        try:
            content = content.decode(self._encoding).encode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.name} is not {self._encoding.upper()} at byte {error.start}") from None
        self._encoding = "utf-8"
        return content[:HEAD], io.BytesIO(content[HEAD:])

    def _decode(self, raw: bytes, number: int, where: str) -> str:
        return decode(raw, where, first=number == 1, encoding=self._encoding, advice=advice)

    def _numbered(self) -> Iterator[tuple[int, bytes]]:
        self._read = 0
        for number, raw in enumerate(self._checked(), 1):
            self._read += len(raw)
            yield number, raw

    def _lines(self) -> Iterator[Record]:
        for number, raw in self._numbered():
            place = f"line {number}"
            try:
                text = self._decode(raw, number, "this")
                if text.strip():
                    value = text if self.form.kind == "lines" else parse(text, "this")
                    yield Record(number, place, self._read, value)
            except InputError as error:
                yield Record(number, place, self._read, error=str(error))

    def _table(self) -> Iterator[Record]:
        rows = self.rows()
        self.columns = [column.strip() for column in next(rows, (0, []))[1]]
        width = len(self.columns)
        for number, (line, cells) in enumerate(rows, 1):
            error = ""
            if len(cells) < width:
                error = f"this has too few columns: {len(cells)}, not {width}"
            elif any(cells[width:]):
                error = f"this has too many columns: {len(cells)}, not {width}; quote a text that holds the delimiter"
            value = None if error else dict(zip(self.columns, cells, strict=False))
            yield Record(number, f"row {number} (line {line})", self._read, value, error)

    def _json(self) -> Iterator[Record]:
        text = self._decode(self._checked().read(), 1, self.name)
        items = parse(text, self.name) if text.strip() else []
        for number, value in enumerate(items, 1):
            yield Record(number, f"row {number}", self.total * number // len(items), value)

    def _parquet(self) -> Iterator[Record]:
        if importlib.util.find_spec("pyarrow") is None:
            raise FailedError(f"{self.name} needs pyarrow: {sys.executable} {INSTALL_EVAL}")
        import pyarrow
        import pyarrow.parquet

        stream = self._checked()
        try:
            if self._file.seekable() and not self.form.gzipped:
                self._file.seek(0)
                stream = self._file
            else:
                stream = io.BytesIO(stream.read())
            source = pyarrow.parquet.ParquetFile(stream)
            self.columns = [field.name for field in source.schema_arrow if _is_readable(field.type)]
            count = source.metadata.num_rows
            batches = source.iter_batches(_PARQUET_ROWS, columns=self.columns, use_threads=False)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield Record(number, f"row {number}", self.total * number // count, row)
        except (pyarrow.ArrowException, ValueError) as error:
            raise InputError(f"{self.name} cannot be read as Parquet: {_first_line(error)}") from None


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _is_readable(kind: Any) -> bool:
    """Whether a Parquet column may hold texts, ids or numbers; vectors and bytes do not and are slow to read."""
    import pyarrow.types as types

    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if is_list else kind
    return not (types.is_binary(inner) or types.is_large_binary(inner) or (is_list and types.is_primitive(inner)))


class _Rejoined(io.RawIOBase):
    """A stream with its first bytes put back, because a pipe cannot be rewound."""

    def __init__(self, head: bytes, rest: IO[bytes]) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head[: len(buffer)] or self._rest.read(len(buffer))
        self._head = self._head[len(data) :]
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def open_input(path: str, given: str | None, encoding: str | None, kinds: Sequence[str] = KINDS) -> Iterator[Input]:
    """Open a file, or standard input for `-`, in one of the forms that a command reads.

    `given` is the form by `--input-format`, None for that of the name; `encoding` is the one by `--encoding`, None for
    that of the byte order mark, else UTF-8.

    Raises:
        InputError: it cannot be opened, or its form is not known.
    """
    encoding = None if encoding is None else encoding_name(encoding)
    if path == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; name a file")
        yield Input(sys.stdin.buffer, "standard input", form_of(path, given, kinds), encoding, kinds)
        return
    try:
        file = open(path, "rb")  # noqa: SIM115  # closed below; errors of the caller's block must pass unchanged
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    with file:
        yield Input(file, path, form_of(path, given, kinds), encoding, kinds)


def values(source: Input) -> Iterator[tuple[str, Any]]:
    """Yield the place and the value of each record; a record without a value is an InputError."""
    for record in source.records():
        where = f"{source.name} {record.place}"
        if record.error:
            raise InputError(where + record.error.removeprefix("this"))
        yield where, record.value
