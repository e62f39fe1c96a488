"""CSV and TSV, as people and programs write them, as rows of cells."""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain

from reranker.errors import InputError

Line = tuple[int, str]
"""Number in the file, from 1, and text with its line end."""
Row = tuple[int, list[str]]
"""Number of its first line, and cells."""

MAX_CELL_LINES = 10_000
"""Lines of a quoted cell of TSV: a stray quote must not swallow the rest of the file."""


def delimiter(heading: str) -> str:
    """Return the delimiter of CSV, comma or semicolon."""
    return max(",;", key=unquoted(heading).count)


def unquoted(line: str) -> str:
    """Return a line of a table without its quoted cells."""
    return re.sub(r'"(?:[^"]|"")*"', "", line)


def read_csv(lines: Iterator[Line], name: str) -> Iterator[Row]:
    """Yield the rows of RFC 4180, delimited by comma or semicolon as the heading is, without blank lines.

    Raises:
        InputError: a quote is not closed, or text follows one.
    """
    csv.field_size_limit(sys.maxsize)
    first = next(lines, None)
    if first is None:
        return
    excel = re.fullmatch(r"sep=(.)\s*", first[1])  # Excel's own declaration of the delimiter
    start = place = first[0] + bool(excel)
    texts = (text for _, text in (lines if excel else chain([first], lines)))
    rows = csv.reader(texts, delimiter=excel[1] if excel else delimiter(first[1]), strict=True)
    try:
        for cells in rows:
            if cells:
                yield place, cells
            place = start + rows.line_num
    except csv.Error as error:
        reason = "a line ends in CR alone" if "universal-newline" in str(error) else error
        raise InputError(f"{name} line {place} is not CSV: {reason}") from None


def read_tsv(lines: Iterator[Line], name: str) -> Iterator[Row]:
    """Yield the rows of a tab-separated file, without blank lines.

    Some programs quote cells as in CSV, so that they may contain tabs and line ends; others never quote. A row is
    read as quoted if only that gives it as many cells as the first line has.

    Raises:
        InputError: both ways do, and the quotes join several lines.
    """
    ahead: deque[Line] = deque()
    width = 0
    while (line := _next(lines, ahead)) is not None:
        number, text = line
        if not text.strip("\r\n"):
            continue
        cells = _split(text)
        width = width or len(cells)
        quoted = None
        if any(cell.startswith('"') and (len(cells) != width or _unquote(cell) == cell) for cell in cells):
            quoted = _read_quoted(line, width, lines, ahead, name)
        yield number, quoted or [_unquote(cell) for cell in cells]


def _next(lines: Iterator[Line], ahead: deque[Line]) -> Line | None:
    return ahead.popleft() if ahead else next(lines, None)


def _split(text: str) -> list[str]:
    return text.rstrip("\r\n").split("\t")


def _read_quoted(line: Line, width: int, lines: Iterator[Line], ahead: deque[Line], name: str) -> list[str] | None:
    """Return the cells of a quoted row, which may take further lines; None, and no line taken, if it is not one."""
    taken = [line]

    def texts() -> Iterator[str]:
        yield line[1]
        while len(taken) < MAX_CELL_LINES and (more := _next(lines, ahead)) is not None:
            taken.append(more)
            yield more[1]

    with suppress(csv.Error):
        cells = next(csv.reader(texts(), delimiter="\t", strict=True))
        if len(cells) == width:
            if len(taken) > 1 and all(len(_split(text)) == width for _, text in taken):
                raise InputError(
                    f"{name} line {line[0]}: a quote opens here and closes in line {taken[-1][0]}, and yet each of "
                    f"these lines is a row of its own; save the file as CSV or JSON lines"
                )
            return cells
    ahead.extendleft(reversed(taken[1:]))
    return None


def _unquote(cell: str) -> str:
    quoted = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return quoted[1].replace('""', '"') if quoted else cell
