"""The form of an input: told by `--input-format` or by the end of its name, and held against its first bytes.

A wrong form would be read all the same: a table as lines, the source of a JSON file as documents. So a name that tells
no form and a content that contradicts its form are errors, and each names the way out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from reranker.errors import InputError

KINDS = ("lines", "jsonl", "json", "csv", "tsv", "parquet")
"""Every form; `--input-format` takes these names."""
ROW_KINDS = KINDS[1:]
"""The forms of rows with a query."""
_ENDS = {
    ".txt": "lines",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_TITLES = {
    "lines": "plain text",
    "jsonl": "JSON lines",
    "json": "a JSON array",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
}
TEXT_NAMES = tuple(
    "text document documents passage content contents body chunk page_content 文本 内容 正文 文档 段落".split()
)
"""Columns and keys that hold the text, the first one that is there first; compared without case."""

HEAD = 1 << 16
"""Bytes of the beginning that are looked at."""

# The first bytes of files that are no text, and how to read such a file.
_SIGNATURES = (
    (re.compile(rb"\x1f\x8b"), "is compressed with gzip; let its name end in .gz, or pipe it through gunzip -c"),
    (re.compile(rb"PAR1"), "is Parquet: --input-format parquet"),
    (re.compile(rb"PK\x03\x04|\xd0\xcf\x11\xe0"), "is an Excel workbook or an archive; save it as CSV (UTF-8)"),
    (re.compile(rb"%PDF-"), "is a PDF; extract its text first"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "is compressed with zstd; unpack it, or compress it with gzip"),
    (re.compile(rb"BZh[1-9]1AY"), "is compressed with bzip2; unpack it, or compress it with gzip"),
    (re.compile(rb"\xfd7zXZ\x00"), "is compressed with xz; unpack it, or compress it with gzip"),
)
_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_REQUEST = re.compile(r'"(documents|texts)"\s*:\s*\[')


@dataclass(frozen=True, slots=True)
class Form:
    """The form of one input.

    Attributes:
        kind: one of `KINDS`.
        gzipped: it is decompressed first.
        given: the user named it, so text that merely looks like another form is no reason to refuse it.
    """

    kind: str
    gzipped: bool
    given: bool


def form_of(path: str, given: str | None, kinds: Sequence[str] = KINDS) -> Form:
    """The form of a file by its name; a name without an end (a pipe, standard input) means lines.

    Args:
        path: the file's name, `-` for standard input.
        given: the value of `--input-format`.
        kinds: the forms that the command reads.

    Raises:
        InputError: the name tells no form, or a form outside `kinds`.
    """
    end, gzipped = end_of(path)
    kind = given or (_ENDS.get(end) if end else "lines")
    if kind is None:
        raise InputError(
            f"cannot tell the form of {path} by its name ({end}); name it with --input-format: {listed(kinds)}"
        )
    if kind not in kinds:
        raise InputError(
            f"{path} is {_TITLES[kind]} by its name, and this command reads {listed(kinds)}: "
            f"name what it is with --input-format"
        )
    return Form(kind, gzipped, given is not None)


def end_of(path: str) -> tuple[str, bool]:
    """The end of a name in lower case, without the `.gz` after it, and whether that was there."""
    file = Path(path)
    gzipped = file.suffix.lower() == ".gz"
    return (file.with_suffix("") if gzipped else file).suffix.lower(), gzipped


def told(path: str) -> str | None:
    """The form of a file whose name tells another one than text: jsonl, json, csv, tsv or parquet."""
    kind = _ENDS.get(end_of(path)[0])
    return None if kind == "lines" else kind


def listed(kinds: Sequence[str]) -> str:
    """Forms in a sentence."""
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def encoding_of(head: bytes, given: str | None, name: str) -> str:
    """The encoding of a text: the given one, else the one that its byte order mark tells, else UTF-8.

    Raises:
        InputError: the mark tells another one than the given.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise InputError(f"{name} is UTF-32; save it as UTF-8")
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    if given and marked and not given.startswith(marked):
        raise InputError(f"{name} begins with the byte order mark of {marked.upper()}; leave --encoding {given} out")
    return given or marked or "utf-8"


def check_bytes(head: bytes, form: Form, name: str) -> None:
    """Hold the first bytes, decompressed, against the form.

    Raises:
        InputError: they are those of another kind of file.
    """
    if form.kind == "parquet":
        if not head.startswith(b"PAR1"):
            raise InputError(f"{name} is not Parquet; name its form with --input-format")
        return
    for signature, says in _SIGNATURES:
        if signature.match(head):
            raise InputError(f"{name} {says}")


def check_text(head: str, form: Form, name: str, kinds: Sequence[str] = KINDS) -> None:
    """Hold the first lines against the form.

    Raises:
        InputError: they are those of another form.
    """
    if "\r" in head and "\n" not in head:
        raise InputError(f"{name} ends its lines with CR alone; save it with LF or CRLF")
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    if not lines:
        return
    looks = _looks(lines)
    if form.kind == "lines":
        wrong = bool(looks) and not form.given
    elif form.kind == "jsonl":
        # One bad line is that line's error. The last line may be half of one, and a first line without an end is.
        whole = len(lines) > 1 or len(head) < HEAD // 4
        wrong = looks == "json" or lines[0] == "{" or (whole and all(_json(line) is None for line in lines))
    elif form.kind == "json":
        wrong = not lines[0].startswith("[")
        if wrong and "lines" in kinds and _REQUEST.search(head) and lines[0].startswith("{"):
            raise InputError(
                f"{name} is a request with its documents, for batch, one a line; this command reads an array of texts"
            )
        looks = looks or ("jsonl" if isinstance(_json(lines[0]), str) else None)
    else:
        looks = looks or _other_table(lines[0], form.kind)
        wrong = looks is not None and looks != form.kind
    if wrong:
        _refuse(name, looks or "lines", form, kinds)


def _refuse(name: str, looks: str, form: Form, kinds: Sequence[str]) -> NoReturn:
    more = ", or --input-format lines to take each line as it stands" if form.kind == "lines" else ""
    if looks == "object":
        raise InputError(f"{name} begins with a JSON object over several lines; write one a line, or an array{more}")
    if looks in kinds:
        raise InputError(f"{name} looks like {_TITLES[looks]}: --input-format {looks}{more}")
    raise InputError(f"{name} looks like {_TITLES[looks]}, and this command reads {listed(kinds)}{more}")


def _looks(lines: Sequence[str]) -> str | None:
    """The form that the first line belongs to, or `object` for JSON that is no form; None where it tells none."""
    first, more = lines[0], lines[1:2]
    value = _json(first)
    if isinstance(value, dict):
        return "jsonl"
    if isinstance(value, list):
        return "jsonl" if more and more[0].startswith("[") else "json"
    if re.match(r'\[\s*(["{\[]|$)', first):
        return "json"
    if re.match(r'\{\s*("|$)', first):
        return "object"
    return _table(first)


def _other_table(heading: str, kind: str) -> str | None:
    """The other form of a table, where the heading is cut by its delimiter and not by that of `kind`."""
    commas, tabs = delimiter(heading) in unquoted(heading), "\t" in unquoted(heading)
    if kind == "csv" and tabs and not commas:
        return "tsv"
    return "csv" if kind == "tsv" and commas and not tabs else None


def _table(heading: str) -> str | None:
    """The form of a table with a text column of a known name."""
    mark = "\t" if "\t" in unquoted(heading) else delimiter(heading)
    names = [cell.strip(' "\ufeff').casefold() for cell in heading.split(mark)]
    if len(names) == 1 or not set(names) & set(TEXT_NAMES) or any(" " in name for name in names):
        return None
    return "tsv" if mark == "\t" else "csv"


def delimiter(line: str) -> str:
    """The delimiter of CSV, comma or semicolon, by its heading."""
    return max(",;", key=unquoted(line).count)


def unquoted(line: str) -> str:
    """A line of a table without its quoted cells."""
    return re.sub(r'"(?:[^"]|"")*"', "", line)


def _json(line: str) -> Any:
    """The value of a line; None where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
