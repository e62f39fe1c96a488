"""CSV and TSV as people and programs save them: cells by row, and which column holds the text."""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain

from reranker.cli.errors import InputError
from reranker.cli.forms import TEXT_NAMES, delimiter

Line = tuple[int, str]
"""Number in the file, from 1, and text with its end."""
Row = tuple[int, list[str]]
"""Number of its first line, and cells."""


def read_csv(lines: Iterator[Line], name: str) -> Iterator[Row]:
    """The rows of RFC 4180, delimited by comma or semicolon as the heading is; blank lines are left out.

    Raises:
        InputError: a quote is not closed, or text follows one.
    """
    csv.field_size_limit(sys.maxsize)
    first = next(lines, None)
    if first is None:
        return
    told = re.fullmatch(r"sep=(.)\s*", first[1])  # Excel's own way to name the delimiter
    begin = first[0] + bool(told)
    texts = (text for _, text in (lines if told else chain([first], lines)))
    rows = csv.reader(texts, delimiter=told[1] if told else delimiter(first[1]), strict=True)
    place = begin
    try:
        for cells in rows:
            if cells:
                yield place, cells
            place = begin + rows.line_num
    except csv.Error as error:
        raise InputError(f"{name} line {place} is not CSV: {error}") from None


def read_tsv(lines: Iterator[Line]) -> Iterator[Row]:
    """The rows of a file of tabs; blank lines are left out.

    A line with as many cells as the first one is taken as it stands, quotes in it too, because many programs write TSV
    without quoting. Where the cells do not fit, they are quoted as in CSV and may hold tabs and line ends.
    """
    ahead: deque[Line] = deque()
    width = 0
    while (line := _next(lines, ahead)) is not None:
        number, text = line
        if not text.strip("\r\n"):
            continue
        cells = _cells(text)
        width = width or len(cells)
        if any(cell.startswith('"') for cell in cells) and (len(cells) != width or _goes_on(cells, lines, ahead)):
            cells = _quoted(line, width, lines, ahead) or cells
        yield number, [_bare(cell) for cell in cells]


def _next(lines: Iterator[Line], ahead: deque[Line]) -> Line | None:
    return ahead.popleft() if ahead else next(lines, None)


def _cells(text: str) -> list[str]:
    return text.rstrip("\r\n").split("\t")


def _goes_on(cells: list[str], lines: Iterator[Line], ahead: deque[Line]) -> bool:
    """Whether the last cell opens a quote that a later line closes: the next line is no row of its own."""
    if not cells[-1].startswith('"') or cells[-1].count('"') % 2 == 0:
        return False
    if not ahead and (line := next(lines, None)) is not None:
        ahead.append(line)
    return bool(ahead) and len(_cells(ahead[0][1])) != len(cells)


def _quoted(line: Line, width: int, lines: Iterator[Line], ahead: deque[Line]) -> list[str] | None:
    """Cells of a quoted row, with the lines after it that it takes; None, and no line taken, where it is none."""
    taken = [line]

    def texts() -> Iterator[str]:
        yield line[1]
        while (more := _next(lines, ahead)) is not None:
            taken.append(more)
            yield more[1]

    with suppress(csv.Error):
        cells = next(csv.reader(texts(), delimiter="\t", strict=True))
        if len(cells) == width:
            return cells
    ahead.extendleft(reversed(taken[1:]))
    return None


def _bare(cell: str) -> str:
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell


def text_column(columns: Sequence[str], field: str | None, name: str, what: str = "column") -> str:
    """The column, or key, that holds the text: the one that is named, else the first of the known names.

    Raises:
        InputError: there is none; names those that there are.
    """
    folded = [column.strip().casefold() for column in columns]
    wanted = TEXT_NAMES if field is None else (field.strip().casefold(),)
    there = f"its {what}s are {', '.join(columns)}" if columns else f"it has no {what}s"
    exact = field is not None and columns.count(field) == 1
    found = [field] if exact else [columns[folded.index(w)] for w in wanted if w in folded]
    if not found:
        if field is not None:
            raise InputError(f"{name} has no {what} {field!r}; {there}: name one with --field")
        if len(columns) == 1 and what == "column":
            raise InputError(
                f"{name} has one column, and its first line {columns[0]!r} is no known heading: if it is one, name it "
                f"with --field; if it is a document, use --input-format lines"
            )
        raise InputError(f"{name} does not tell which {what} holds the text; {there}: name one with --field")
    chosen = str(found[0])
    if not exact and folded.count(chosen.strip().casefold()) > 1:
        raise InputError(f"{name} has the {what} {chosen!r} twice; rename one")
    return chosen
