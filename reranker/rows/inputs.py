"""An input in any form as records, one after another, for `rank`, `batch` and `evaluate` alike."""

from __future__ import annotations

import codecs
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
from reranker.rows.forms import HEAD, KINDS, Form, check_bytes, check_text, encoding_of, form_of
from reranker.rows.lines import decode, parse
from reranker.rows.tables import Line, Row, read_csv, read_tsv

_ROWS = 128
"""Rows of a Parquet file in memory at once."""


@dataclass(frozen=True, slots=True)
class Record:
    """A line, a row of a table or of a Parquet file, or an item of a JSON array.

    Attributes:
        number: its place among the lines or rows, from 1.
        place: the same for people, with the line of the file.
        end: how much of `Input.total` is read with it.
        value: a text, a JSON value, or the cells by column.
        error: the reason why there is no value, as a sentence about `this`.
    """

    number: int
    place: str
    end: int
    value: Any = None
    error: str = ""


def encoding_name(text: str) -> str:
    """The name that Python has for an encoding, GB18030 for its subsets.

    Raises:
        InputError: there is no such encoding, or it has line ends of its own.
    """
    try:
        name = codecs.lookup(text).name
        known = name.startswith(("utf-16", "utf-32")) or b"\n".decode(name, errors="replace") == "\n"
    except (LookupError, ValueError):
        known = False
    if not known:
        raise InputError(f"--encoding={text!r} is not known; such as utf-8, gb18030, utf-16 or big5")
    return {"gbk": "gb18030", "gb2312": "gb18030", "utf-8-sig": "utf-8"}.get(name, name)


class Input:
    """A file or standard input whose form is known. `open_input` makes it.

    Attributes:
        name: for messages.
        form: its form.
        total: bytes of the content, decompressed; the last `Record.end`. Known after `digest`.
        columns: of a table or Parquet file, known with the first record.
    """

    def __init__(self, file: IO[bytes], name: str, form: Form, encoding: str | None, kinds: Sequence[str]) -> None:
        self.file = file
        self.name = name
        self.form = form
        self.total = 0
        self._given = encoding
        self._kinds = kinds
        self._encoding = "utf-8"
        self.columns: list[str] = []
        self._read = 0
        self._started = False

    @property
    def unit(self) -> str:
        """The noun that a record's number counts."""
        return "line" if self.form.kind in ("lines", "jsonl") else "row"

    def check_encoding(self) -> None:
        """Refuse an encoding that has no effect.

        Raises:
            InputError: it was given, and Parquet has one of its own.
        """
        if self.form.kind == "parquet" and self._given is not None:
            raise InputError(f"--encoding has no effect: {self.name} is Parquet, always UTF-8; leave it out")

    def digest(self) -> str:
        """SHA-256 of the whole content, decompressed. For files only: it is read again afterwards.

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
        """All records; blank lines are left out. The error of a line is its record's.

        Raises:
            InputError: the file cannot be read, or contradicts its form.
        """
        kind = self.form.kind
        with self._reading():
            if kind == "parquet":
                yield from self._parquet()
            elif kind == "json":
                yield from self._json()
            elif kind in ("csv", "tsv"):
                yield from self._table()
            else:
                yield from self._lines()

    def rows(self) -> Iterator[Row]:
        """The cells of a table, its heading among them.

        Raises:
            InputError: see `records`.
        """
        with self._reading():
            yield from (read_csv if self.form.kind == "csv" else read_tsv)(self._texts(), self.name)

    def texts(self) -> Iterator[Line]:
        """Numbered lines with their ends, for tables: there a bad line spoils the rows after it as well.

        Raises:
            InputError: see `records`.
        """
        with self._reading():
            yield from self._texts()

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
        """The content from its beginning, decompressed."""
        if self._started:
            self.file.seek(0)
        self._started = True
        return gzip.GzipFile(fileobj=self.file) if self.form.gzipped else self.file  # type: ignore[return-value]

    def _checked(self) -> IO[bytes]:
        """The content, as text that has its line ends in single bytes, held against the form."""
        stream = self._stream()
        head = stream.read(HEAD)
        check_bytes(head, self.form, self.name)
        if self.form.kind == "parquet":
            return io.BufferedReader(_Rejoined(head, stream), 1 << 20)
        self._encoding = encoding_of(head, self._given, self.name)
        if self._encoding.startswith(("utf-16", "utf-32")):
            if not head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and _is_plain(head):
                raise InputError(f"{self.name} is UTF-8; leave --encoding {self._given} out")
            head, stream = self._recoded(head + stream.read())
        elif b"\0" in head:
            raise InputError(f"{self.name} holds NUL bytes: it is no text, or UTF-16 (--encoding utf-16-le)")
        elif self._encoding != "utf-8" and _is_utf8(head):
            raise InputError(f"{self.name} is UTF-8; leave --encoding {self._given} out")
        text = head.decode(self._encoding, errors="replace").removeprefix("\ufeff")
        check_text(text, self.form, self.name, self._kinds)
        return io.BufferedReader(_Rejoined(head, stream), 1 << 20)

    def _recoded(self, content: bytes) -> tuple[bytes, IO[bytes]]:
        try:
            content = content.decode(self._encoding).encode()
        except UnicodeDecodeError as error:
            raise InputError(f"{self.name} is not {self._encoding.upper()} at byte {error.start}") from None
        self._encoding = "utf-8"
        return content[:HEAD], io.BytesIO(content[HEAD:])

    def _advice(self, raw: bytes) -> str:
        """How to read a line that is not in the encoding that is assumed."""
        if self._encoding != "utf-8":
            return "it is UTF-8; leave --encoding out" if _decodes(raw, "utf-8") else "name another with --encoding"
        if _decodes(raw, "gb18030"):
            return "if the file is GBK: --encoding gb18030"
        return "save it as UTF-8, or name its encoding with --encoding"

    def _decode(self, raw: bytes, number: int, where: str) -> str:
        return decode(raw, where, first=number == 1, encoding=self._encoding, advice=self._advice)

    def _counted(self) -> Iterator[tuple[int, bytes]]:
        """Numbered lines as bytes."""
        self._read = 0
        for number, raw in enumerate(self._checked(), 1):
            self._read += len(raw)
            yield number, raw

    def _lines(self) -> Iterator[Record]:
        for number, raw in self._counted():
            place = f"line {number}"
            try:
                text = self._decode(raw, number, "this")
                if text.strip():
                    value = text if self.form.kind == "lines" else parse(text, "this")
                    yield Record(number, place, self._read, value)
            except InputError as error:
                yield Record(number, place, self._read, error=str(error))

    def _texts(self) -> Iterator[Line]:
        for number, raw in self._counted():
            body = raw.rstrip(b"\r\n")
            text = self._decode(body, number, f"{self.name} line {number}")
            yield number, text + raw[len(body) :].decode("ascii")

    def _table(self) -> Iterator[Record]:
        rows = self.rows()
        self.columns = [column.strip() for column in next(rows, (0, []))[1]]
        width = len(self.columns)
        for number, (line, cells) in enumerate(rows, 1):
            place = f"row {number} (line {line})"
            if len(cells) < width:
                error = f"this has too few columns: {len(cells)}, not {width}"
                yield Record(number, place, self._read, error=error)
            elif any(cells[width:]):
                error = f"this has too many columns: {len(cells)}, not {width}; quote a text that holds the delimiter"
                yield Record(number, place, self._read, error=error)
            else:
                yield Record(number, place, self._read, dict(zip(self.columns, cells, strict=False)))

    def _json(self) -> Iterator[Record]:
        text = self._decode(self._checked().read(), 1, self.name)
        items = parse(text, self.name) if text.strip() else []
        for number, value in enumerate(items, 1):
            yield Record(number, f"row {number}", self.total * number // len(items), value)

    def _parquet(self) -> Iterator[Record]:
        if importlib.util.find_spec("pyarrow") is None:
            raise FailedError(f"{self.name} needs pyarrow: pip install -r requirements-eval.txt")
        import pyarrow
        import pyarrow.parquet

        stream = self._checked()
        try:
            if self.file.seekable() and not self.form.gzipped:
                self.file.seek(0)
                stream = self.file
            else:
                stream = io.BytesIO(stream.read())
            source = pyarrow.parquet.ParquetFile(stream)
            self.columns = [field.name for field in source.schema_arrow if _readable(field.type)]
            count = source.metadata.num_rows
            batches = source.iter_batches(_ROWS, columns=self.columns, use_threads=False)
            for number, row in enumerate(chain.from_iterable(batch.to_pylist() for batch in batches), 1):
                yield Record(number, f"row {number}", self.total * number // count, row)
        except (pyarrow.ArrowException, ValueError) as error:
            raise InputError(f"{self.name} cannot be read as Parquet: {_first_line(error)}") from None


def _first_line(error: object) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _readable(kind: Any) -> bool:
    """Whether a Parquet column can matter here: vectors and bytes cannot, and would be slow."""
    import pyarrow.types as types

    listed = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    inner = kind.value_type if listed else kind
    return not (types.is_binary(inner) or types.is_large_binary(inner) or (listed and types.is_primitive(inner)))


def _decodes(raw: bytes, encoding: str) -> bool:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True


def _is_utf8(head: bytes) -> bool:
    """Whether this is UTF-8 beyond doubt: ten characters of another encoding are hardly ever valid UTF-8."""
    text = codecs.getincrementaldecoder("utf-8")("ignore").decode(head)
    return sum(not c.isascii() for c in text) >= 10 and text.encode() == head[: len(text.encode())]


def _is_plain(head: bytes) -> bool:
    """Whether this is UTF-8 without control characters: the line ends and blanks of UTF-16 hold NUL bytes."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return bool(text) and all(c >= " " or c in "\t\r\n" for c in text)


class _Rejoined(io.RawIOBase):
    """A stream with its first bytes put back; a pipe can be read once only."""

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
    """Open a file, or standard input for `-`.

    Args:
        path: its name.
        given: the form by `--input-format`; None: by the name.
        encoding: by `--encoding`; None: by the byte order mark, else UTF-8.
        kinds: the forms that the command reads.

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
        file = open(path, "rb")  # noqa: SIM115  # closed below; the caller's own errors must pass unchanged
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    with file:
        yield Input(file, path, form_of(path, given, kinds), encoding, kinds)


def values(source: Input) -> Iterator[tuple[str, Any]]:
    """Place and value of each record.

    Raises:
        InputError: one has no value.
    """
    for record in source.records():
        where = f"{source.name} {record.place}"
        if record.error:
            raise InputError(where + record.error.removeprefix("this"))
        yield where, record.value
