"""CSV and TSV as people and programs save them: cells by row, and which column holds the text."""

from __future__ import annotations

import csv
import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain

from reranker.errors import InputError
from reranker.rows.forms import TEXT_NAMES, delimiter
from reranker.terminal import name_list

Line = tuple[int, str]
"""Number in the file, from 1, and text with its end."""
Row = tuple[int, list[str]]
"""Number of its first line, and cells."""

_CELL_LINES = 10_000
"""Lines of a quoted cell of TSV at most: a stray quote must not take the rest of the file."""


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
        why = "a line ends in CR alone" if "universal-newline" in str(error) else error
        raise InputError(f"{name} line {place} is not CSV: {why}") from None


def read_tsv(lines: Iterator[Line], name: str) -> Iterator[Row]:
    """The rows of a file of tabs; blank lines are left out.

    Some programs quote cells as in CSV, which may then hold tabs and line ends; others never quote, and a quote is
    a character like others. A row is read in the way that gives it as many cells as the first line has.

    Raises:
        InputError: both ways do, and one makes a single row of several lines.
    """
    ahead: deque[Line] = deque()
    width = 0
    while (line := _next(lines, ahead)) is not None:
        number, text = line
        if not text.strip("\r\n"):
            continue
        cells = _cells(text)
        width = width or len(cells)
        quoted = None
        if any(cell.startswith('"') and (len(cells) != width or _bare(cell) == cell) for cell in cells):
            quoted = _quoted(line, width, lines, ahead, name)
        yield number, quoted or [_bare(cell) for cell in cells]


def _next(lines: Iterator[Line], ahead: deque[Line]) -> Line | None:
    return ahead.popleft() if ahead else next(lines, None)


def _cells(text: str) -> list[str]:
    return text.rstrip("\r\n").split("\t")


def _quoted(line: Line, width: int, lines: Iterator[Line], ahead: deque[Line], name: str) -> list[str] | None:
    """Cells of a quoted row, with the lines after it that it takes; None, and no line taken, where it is none."""
    taken = [line]

    def texts() -> Iterator[str]:
        yield line[1]
        while len(taken) < _CELL_LINES and (more := _next(lines, ahead)) is not None:
            taken.append(more)
            yield more[1]

    with suppress(csv.Error):
        cells = next(csv.reader(texts(), delimiter="\t", strict=True))
        if len(cells) == width:
            if len(taken) > 1 and all(len(_cells(text)) == width for _, text in taken):
                raise InputError(
                    f"{name} line {line[0]}: a quote opens here and closes in line {taken[-1][0]}, and yet each of "
                    f"these lines is a row of its own; save the file as CSV or JSON lines"
                )
            return cells
    ahead.extendleft(reversed(taken[1:]))
    return None


def _bare(cell: str) -> str:
    whole = re.fullmatch(r'"((?:[^"]|"")*)"', cell)
    return whole[1].replace('""', '"') if whole else cell


def text_column(
    columns: Sequence[str], field: str | None, name: str, what: str = "column", cure: str = "name one with --field"
) -> str:
    """The column, or key, that holds the text: `field`, else the first of the known names.

    Args:
        columns: names of columns or keys.
        field: the wanted one; None: a known name.
        name: the file, for messages.
        what: the noun for a column.
        cure: what to do where none is known.

    Raises:
        InputError: there is none; names those that there are.
    """
    folded = [column.strip().casefold() for column in columns]
    wanted = TEXT_NAMES if field is None else (field.strip().casefold(),)
    there = f"its {what}s are {name_list(columns)}" if columns else f"it has no {what}s"
    exact = field is not None and columns.count(field) == 1
    found = [field] if exact else [columns[folded.index(w)] for w in wanted if w in folded]
    if not found:
        if field is not None:
            raise InputError(f"{name} has no {what} {field!r}; {there}: name one with --field")
        raise InputError(f"{name} does not tell which {what} holds the text; {there}: {cure}")
    chosen = str(found[0])
    if not exact:
        demand_once(columns, (chosen,), name, what)
    return chosen


def demand_once(columns: Sequence[str], wanted: Iterable[str], name: str, what: str = "column") -> None:
    """Refuse a heading that has one of the wanted columns twice, in any case: the last would be read in silence.

    Raises:
        InputError: names the column.
    """
    folded = [column.strip().casefold() for column in columns]
    for one in wanted:
        if folded.count(one.strip().casefold()) > 1:
            raise InputError(f"{name} has the {what} {one!r} twice; rename one")
