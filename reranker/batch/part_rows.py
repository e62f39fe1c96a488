"""The rows of a part: each a request, or the reason why it is none; with the words of `python -m reranker batch`."""

from __future__ import annotations

import io
import itertools
import sys
from collections.abc import Iterator
from typing import IO, Any

import pyarrow.parquet

from reranker.batch import store
from reranker.batch.parts import Part
from reranker.errors import InputError
from reranker.notes import Notes
from reranker.rows.groups import Row, row_of
from reranker.rows.lines import decode, parse
from reranker.rows.row import COLUMNS
from reranker.terminal import harmless

_LONGEST = 64 << 20
"""Bytes of a line; one that is longer is no row, and is never held in memory."""
_ROWS = 128
"""Rows of a Parquet file in memory at once."""
NOTES = Notes(lambda text: print(harmless(text), file=sys.stderr, flush=True))
"""Of this process: Ray shows an actor's lines where the batch was started."""


def rows(part: Part, top_k: int | None, instruction: str | None) -> Iterator[Row]:
    """The rows of a part, blank lines left out; a few are in memory at once.

    Args:
        part: where they are.
        top_k: how many results, where a row does not say.
        instruction: where a row does not say.

    Raises:
        InputError: the file cannot be read.
    """
    with store.opened(part.address) as file:
        for number, body in _parquet(file, part) if part.parquet else _lines(file, part):
            row = body if isinstance(body, Row) else row_of(number, body, top_k, instruction)
            NOTES.add(row.warnings, f"{part.file} {'row' if part.parquet else 'line'} {number}: ")
            yield row


def _lines(raw_file: IO[bytes], part: Part) -> Iterator[tuple[int, Any]]:
    """Line numbers and JSON values; a Row in the place of a value says what is wrong with a line."""
    file = io.BufferedReader(raw_file, 1 << 20)  # type: ignore[type-var]  # files of stores take no limit in readline
    file.seek(part.start)
    position = part.start
    for number in itertools.count(part.first):
        raw = b"" if position >= part.stop else file.readline(_LONGEST)
        if not raw:
            return
        position += len(raw)
        if len(raw) == _LONGEST and not raw.endswith(b"\n"):
            while more := file.readline(_LONGEST):
                position += len(more)
                if more.endswith(b"\n"):
                    break
            yield number, Row(number, error=f"longer than {_LONGEST >> 20} MiB")
            continue
        try:
            content = decode(raw, "this", first=number == 1)
            if content.strip():
                yield number, parse(content, "this")
        except InputError as error:
            yield number, Row(number, error=str(error))


def _parquet(file: IO[bytes], part: Part) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row numbers and rows, of the columns that mean something."""
    source = pyarrow.parquet.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
    ends = list(
        itertools.accumulate(source.metadata.row_group(i).num_rows for i in range(source.metadata.num_row_groups))
    )
    wanted = [i for i, end in enumerate(ends) if end > part.start and (i == 0 or ends[i - 1] < part.stop)]
    position = ends[wanted[0] - 1] if wanted[0] else 0
    names = source.schema_arrow.names
    columns = [name for name in COLUMNS if name in names]
    NOTES.add((f"the column {name} is not read" for name in names if name not in COLUMNS), f"{part.file}: ")
    for batch in source.iter_batches(_ROWS, row_groups=wanted, columns=columns, use_threads=False):
        start, stop = max(position, part.start), min(position + batch.num_rows, part.stop)
        if start < stop:
            yield from enumerate(batch.slice(start - position, stop - start).to_pylist(), start + 1)
        position += batch.num_rows
        if position >= part.stop:
            return
