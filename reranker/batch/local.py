"""`batch`: rows in, JSON lines out, for as long as it takes. Run again after an interruption, it goes on.

in   {"id": ..., "query": "...", "documents": ["...", ...], "top_k": 3, "instruction": "..."}     only two are required
     {"id": ..., "query": "...", "document": "...", "instruction": "..."}                         a pair
out  {"line": 1, "id": ..., "results": [{"index": 0, "score": 0.98}, ...]}                  one for each row, in order
     {"line": 1, "id": ..., "score": 0.98}                                                  for a pair

Rows are JSON lines, or items of a JSON array, rows of CSV, TSV or Parquet; for those the output says `row`, not `line`.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from reranker.batch.journal import Journal
from reranker.cli.options import source
from reranker.errors import FailedError, InputError, InvalidRequestError, RerankError
from reranker.notes import Notes
from reranker.rankers.ranker import Ranker, Scored
from reranker.rankers.source import open_ranker
from reranker.rows.cells import Cells, RowError
from reranker.rows.groups import Row, groups, joined, row_of
from reranker.rows.inputs import Input, Record, open_input
from reranker.terminal import meter, plural, truncated
from reranker.types import RerankRequest

KINDS = ("jsonl", "json", "csv", "tsv", "parquet")
"""The forms of rows."""


def batch(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: a row cannot be used; everything before it is written.
        FailedError: scoring failed, or the output cannot be written.
    """
    where = source(args)
    output = Path(args.output)
    _check_paths(Path(args.input), output)
    with open_input(args.input, args.input_format, args.encoding, KINDS) as rows:
        rows.check_encoding()
        options = {"input": rows.digest(), "top_k": args.top_k, "instruction of requests": args.instruction}
        options |= {name: getattr(args, name) for name in ("field", "encoding", "input_format") if getattr(args, name)}
        with Journal(output, options | where.identity, overwrite=args.overwrite, unit=rows.unit) as journal:
            _run(args, open_ranker(where), _Reader(rows, args, skip_to=journal.last), journal)
            journal.finish()


def _check_paths(path: Path, output: Path) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file")
    if str(path) == "-" or (path.exists() and not path.is_file()):
        name = "standard input" if str(path) == "-" else path
        raise InputError(f"{name} is a pipe, and batch reads its input again to continue; write it to a file first")
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.resolve() == output.resolve():
        raise InputError("the output must be another file than the input")
    if not output.parent.is_dir():
        raise InputError(f"the folder {output.parent} does not exist")


def _run(args: argparse.Namespace, ranker: Ranker, read: _Reader, journal: Journal) -> None:
    unit, before = journal.unit, journal.lines
    bad = shortened = queries = 0
    start = time.monotonic()
    with meter(read.input.total) as shown:
        if before:
            shown.say(f"continuing after {unit} {journal.last}: {_done(before, unit)}")
        notes = Notes(shown.say)
        for group, outcome in _answers(ranker, read):
            for row in group:
                notes.add(row.warnings, f"{row.place}: ")
            if isinstance(outcome, Scored):
                _write(journal, group, outcome)
                shortened += outcome.truncated
                queries += outcome.query_truncated
                shown.advance(group[-1].end, len(outcome.scores))
                continue
            if not isinstance(outcome, InvalidRequestError):
                raise FailedError(f"{group[0].place}: {outcome}; run the same command again to continue")
            if not args.skip_bad:
                raise InputError(f"{group[0].place}: {outcome}; {_way_out(journal)}")
            for row in group:
                shown.say(f"{row.place} skipped: {outcome}")
                journal.write(row.number, {"id": row.id, "error": str(outcome)})
            bad += len(group)
            shown.advance(group[-1].end, 0)
        seconds = time.monotonic() - start
        rows, documents = plural(journal.lines - before, unit), plural(shown.documents, "document")
        shown.say(f"{rows}, {documents} in {seconds:.1f} s ({shown.rate})")
        if bad:
            were, each = ("was", "it") if bad == 1 else ("were", "each")
            shown.say(f'{plural(bad, f"bad {unit}")} {were} skipped; the output says "error" for {each}')
        if shortened:
            shown.say(truncated(shortened, args.url))
        if queries:
            shown.say(truncated(queries, args.url, "query", "queries"))


def _write(journal: Journal, group: list[Row], scored: Scored) -> None:
    if group[0].pair:
        for row, score in zip(group, scored.scores, strict=True):
            journal.write(row.number, {"id": row.id, "score": score})
        return
    best = [{"index": i, "score": scored.scores[i]} for i in scored.best(group[0].top_k)]
    journal.write(group[0].number, {"id": group[0].id, "results": best})


def _done(count: int, unit: str) -> str:
    return f"{plural(count, unit)} {'is' if count == 1 else 'are'} done"


def _way_out(journal: Journal) -> str:
    if not journal.lines:
        return "correct it, or run again with --skip-bad"
    return (
        f"{_done(journal.lines, journal.unit)}: run again with --skip-bad to continue, "
        f"or correct the input and start anew with --overwrite"
    )


def _answers(ranker: Ranker, read: _Reader) -> Iterator[tuple[list[Row], Scored | RerankError]]:
    """Each group of rows with its outcome, in order: rows that hold no request wait for their turn as well.

    Raises:
        InputError: the input cannot be read any further.
    """
    for outcome in ranker.rank_many(read.requests()):
        yield from _bad(read.groups)
        yield read.groups.popleft(), outcome
    yield from _bad(read.groups)
    if read.failure:
        raise read.failure


def _bad(waiting: deque[list[Row]]) -> Iterator[tuple[list[Row], RerankError]]:
    while waiting and waiting[0][0].request is None:
        yield waiting[0], InvalidRequestError(waiting[0][0].error)
        waiting.popleft()


class _Reader:
    """The input row by row; a worker thread reads, the main thread takes `groups`."""

    def __init__(self, rows: Input, args: argparse.Namespace, skip_to: int) -> None:
        self.input = rows
        self.args = args
        self.skip_to = skip_to
        self.groups: deque[list[Row]] = deque()
        """Read and not answered yet."""
        self.failure: InputError | None = None
        """Why the input ended early."""

    def requests(self) -> Iterator[RerankRequest]:
        """The requests of the good rows; ends at the first bad one, unless those are skipped."""
        for group in groups(self._rows()):
            self.groups.append(group)
            request = joined(group)
            if request is not None:
                yield request
            elif not self.args.skip_bad:
                return

    def _rows(self) -> Iterator[Row]:
        cells = Cells(self.input, self.args.field)
        try:
            for record in self.input.records():
                if record.number > self.skip_to:
                    yield self._row(record, cells)
        except InputError as error:
            self.failure = error

    def _row(self, record: Record, cells: Cells) -> Row:
        row = Row(record.number, error=record.error)
        if not record.error:
            try:
                row = row_of(record.number, cells.body(record.value), self.args.top_k, self.args.instruction)
            except RowError as error:
                row = replace(row, error=str(error))
        return replace(row, place=record.place, end=record.end)
