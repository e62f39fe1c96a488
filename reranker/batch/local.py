"""A batch on this machine: rows of one file in, JSON lines out (docs/files.md). Run again, it continues."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from reranker.batch.journal import Journal
from reranker.batch.scoring import Totals, answers
from reranker.errors import FailedError, InputError, InvalidRequestError, RerankError
from reranker.notes import Notes
from reranker.rankers.ranker import Ranker
from reranker.rankers.source import Source, open_ranker
from reranker.rows.cells import Cells, RowError
from reranker.rows.forms import ROW_KINDS
from reranker.rows.inputs import Input, open_input
from reranker.rows.row import Defaults, Row, read_row
from reranker.terminal import Meter, meter, plural, waiting


@dataclass(frozen=True, slots=True)
class Job:
    """A batch on this machine."""

    input: str
    output: Path
    source: Source
    defaults: Defaults
    input_format: str | None = None
    field: str | None = None
    encoding: str | None = None
    skip_bad: bool = False
    overwrite: bool = False


def run(job: Job) -> None:
    """Score all rows, or those that an earlier run did not.

    Raises:
        InputError: a row cannot be used; everything before it is written.
        FailedError: scoring failed, or the output cannot be written.
    """
    _check_paths(Path(job.input), job.output)
    with open_input(job.input, job.input_format, job.encoding, ROW_KINDS) as file:
        file.check_encoding()
        options = {"field": job.field, "encoding": job.encoding, "input_format": job.input_format}
        with waiting(f"reading {job.input}"):
            digest = file.digest()
        manifest = {"input": digest} | {name: value for name, value in options.items() if value}
        manifest |= job.defaults.identity | job.source.identity
        with Journal(job.output, manifest, overwrite=job.overwrite, unit=file.unit) as journal:
            ranker = open_ranker(job.source)
            with meter(file.total) as progress:
                _score(job, ranker, file, journal, progress)
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


def _score(job: Job, ranker: Ranker, file: Input, journal: Journal, progress: Meter) -> None:
    totals, start = Totals(), time.monotonic()
    if journal.lines:
        progress.say(f"continuing after {file.unit} {journal.last}: {_done(journal)}")
    rows, notes = _rows(job, file, journal.last), Notes(progress.say)
    for answer in answers(ranker, rows, notes.add, stop_at_bad=not job.skip_bad):
        if isinstance(answer.outcome, RerankError):
            _check_skipped(answer.rows[0].place, answer.outcome, job, journal)
            for row in answer.rows:
                progress.say(f"{row.place} skipped: {answer.outcome}")
        for number, record in answer.records:
            journal.write(number, record)
        totals.add(answer)
        progress.advance(answer.rows[-1].end, answer.documents)
    progress.say(totals.speed(time.monotonic() - start, file.unit))
    for line in totals.losses('"error" in the output', file.unit, job.source.url):
        progress.say(line)


def _rows(job: Job, file: Input, after: int) -> Iterator[Row]:
    cells = Cells(file, job.field)
    for record in file.records():
        if record.number > after:
            try:
                value = None if record.error else cells.body(record.value)
                yield read_row(replace(record, value=value), job.defaults)
            except RowError as error:
                yield read_row(replace(record, error=str(error)), job.defaults)


def _check_skipped(place: str, error: RerankError, job: Job, journal: Journal) -> None:
    """Raise an error that ends the batch, unless it is that of a bad row, which the job skips."""
    if not isinstance(error, InvalidRequestError):
        raise FailedError(f"{place}: {error}; run the same command again to continue")
    if not job.skip_bad and journal.lines:
        way_out = "run again with --skip-bad to continue, or correct the input and start anew with --overwrite"
        raise InputError(f"{place}: {error}; {_done(journal)}: {way_out}")
    if not job.skip_bad:
        raise InputError(f"{place}: {error}; correct it, or run again with --skip-bad")


def _done(journal: Journal) -> str:
    return f"{plural(journal.lines, journal.unit)} {'is' if journal.lines == 1 else 'are'} done"
