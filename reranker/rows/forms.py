"""The form of an input: by `--input-format` or the suffix of its name, and checked against its first bytes.

A wrong form would be read without an error: a table as lines, the source of a JSON file as documents. So a suffix that
tells no form and content that contradicts its form are errors, and each names the fix.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from reranker.errors import InputError
from reranker.rows.columns import TEXT_NAMES
from reranker.rows.tables import delimiter, unquoted

_TITLES = {
    "lines": "plain text",
    "jsonl": "JSON lines",
    "json": "a JSON array",
    "csv": "CSV",
    "tsv": "TSV",
    "parquet": "Parquet",
}
KINDS = tuple(_TITLES)
"""Every form; `--input-format` takes these names."""
ROW_KINDS = KINDS[1:]
"""The forms of rows with a query."""
_SUFFIXES = {f".{kind}": kind for kind in ROW_KINDS} | {".txt": "lines", ".ndjson": "jsonl"}

HEAD = 1 << 16
"""Bytes at the beginning that are checked."""

_SIGNATURES = (
    (re.compile(rb"\x1f\x8b"), "is compressed with gzip; let its name end in .gz, or pipe it through gunzip -c"),
    (re.compile(rb"PAR1"), "is Parquet: --input-format parquet"),
    (re.compile(rb"PK\x03\x04|\xd0\xcf\x11\xe0"), "is an Excel workbook or an archive; save it as CSV (UTF-8)"),
    (re.compile(rb"%PDF-"), "is a PDF; extract its text first"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "is compressed with zstd; unpack it, or compress it with gzip"),
    (re.compile(rb"BZh[1-9]1AY"), "is compressed with bzip2; unpack it, or compress it with gzip"),
    (re.compile(rb"\xfd7zXZ\x00"), "is compressed with xz; unpack it, or compress it with gzip"),
)
"""First bytes of files that are not text, and how to read such a file."""
_REQUEST = re.compile(r'"(documents|texts)"\s*:\s*\[')


@dataclass(frozen=True, slots=True)
class Form:
    """The form of one input: one of `KINDS`, perhaps compressed."""

    kind: str
    gzipped: bool
    given: bool
    """The user named it, so content that resembles another form is not refused."""


def form_of(path: str, given: str | None, kinds: Sequence[str] = KINDS) -> Form:
    """Return the form `given` by `--input-format`, else by the name; without a suffix (a pipe) it is lines.

    Raises:
        InputError: the name tells no form, or a form outside `kinds`.
    """
    suffix, gzipped = _suffix(path)
    kind = given or (_SUFFIXES.get(suffix) if suffix else "lines")
    if kind is None:
        raise InputError(
            f"cannot tell the form of {path} by its name ({suffix}); name it with --input-format: {_listed(kinds)}"
        )
    if kind not in kinds:
        raise InputError(
            f"{path} is {_TITLES[kind]} by its name, and this command reads {_listed(kinds)}: "
            f"name its form with --input-format"
        )
    return Form(kind, gzipped, given is not None)


def structured_kind(path: str) -> str | None:
    """Return the form that a name tells, other than lines: jsonl, json, csv, tsv or parquet."""
    kind = _SUFFIXES.get(_suffix(path)[0])
    return None if kind == "lines" else kind


def _suffix(path: str) -> tuple[str, bool]:
    """Return the suffix in lower case, without `.gz`, and whether there was a `.gz`."""
    file = Path(path)
    gzipped = file.suffix.lower() == ".gz"
    return (file.with_suffix("") if gzipped else file).suffix.lower(), gzipped


def _listed(kinds: Sequence[str]) -> str:
    return f"{', '.join(kinds[:-1])} or {kinds[-1]}"


def check_bytes(head: bytes, form: Form, name: str) -> None:
    """Refuse the first bytes, decompressed, of another kind of file."""
    if form.kind == "parquet":
        if not head.startswith(b"PAR1"):
            raise InputError(f"{name} is not Parquet; name its form with --input-format")
        return
    for signature, problem in _SIGNATURES:
        if signature.match(head):
            raise InputError(f"{name} {problem}")


def check_text(head: str, form: Form, name: str, kinds: Sequence[str] = KINDS) -> None:
    """Refuse the first lines of another form."""
    if "\r" in head and "\n" not in head:
        raise InputError(f"{name} ends its lines with CR alone; save it with LF or CRLF")
    lines = [line.strip() for line in head.split("\n") if line.strip()]
    if not lines:
        return
    looks = _looks(lines)
    if form.kind == "lines":
        wrong = bool(looks) and not form.given
    elif form.kind == "jsonl":
        # One bad line is that line's error. The last line may be incomplete, and so is a first line without an end.
        complete = len(lines) > 1 or len(head) < HEAD // 4
        wrong = looks == "json" or lines[0] == "{" or (complete and all(_json(line) is None for line in lines))
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
    raise InputError(f"{name} looks like {_TITLES[looks]}, and this command reads {_listed(kinds)}{more}")


def _looks(lines: Sequence[str]) -> str | None:
    """Return the form of the first line, `object` for JSON that is no form, or None if it tells none."""
    first, second = lines[0], lines[1] if len(lines) > 1 else ""
    value = _json(first)
    if isinstance(value, dict):
        return "jsonl"
    if isinstance(value, list):
        return "jsonl" if second.startswith("[") else "json"
    if re.match(r'\[\s*(["{\[]|$)', first):
        return "json"
    return "object" if re.match(r'\{\s*("|$)', first) else _table(first)


def _other_table(heading: str, kind: str) -> str | None:
    """Return the other form of a table, if the heading contains its delimiter and not that of `kind`."""
    commas, tabs = delimiter(heading) in unquoted(heading), "\t" in unquoted(heading)
    if kind == "csv" and tabs and not commas:
        return "tsv"
    return "csv" if kind == "tsv" and commas and not tabs else None


def _table(heading: str) -> str | None:
    """Return the form of a table with a text column of a known name."""
    mark = "\t" if "\t" in unquoted(heading) else delimiter(heading)
    names = [cell.strip(' "\ufeff').casefold() for cell in heading.split(mark)]
    if len(names) == 1 or not set(names) & set(TEXT_NAMES) or any(" " in name for name in names):
        return None
    return "tsv" if mark == "\t" else "csv"


def _json(line: str) -> Any:
    """Return the value of a line; None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
