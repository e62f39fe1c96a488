"""`batch`: JSON lines in, JSON lines out, for as long as it takes. Run again after an interruption, it goes on.

in   {"id": ..., "query": "...", "documents": ["...", ...], "top_k": 3, "instruction": "..."}     only two are required
out  {"line": 1, "id": ..., "results": [{"index": 0, "score": 0.98}, ...]}                  one for each line, in order
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from reranker.cli.errors import FailedError, InputError
from reranker.cli.journal import Journal
from reranker.cli.lines import decode, opened, parse
from reranker.cli.options import source
from reranker.cli.ranker import Ranker, Scored, open_ranker
from reranker.cli.rows import request_of
from reranker.cli.terminal import Meter, meter
from reranker.errors import InvalidRequestError, RerankError
from reranker.notes import Notes
from reranker.types import RerankRequest


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the input."""

    number: int
    end: int
    """Bytes of the input up to its end."""
    id: Any = None
    request: RerankRequest | None = None
    top_k: int | None = None
    error: str = ""
    """Why there is no request."""
    warnings: tuple[str, ...] = ()
    """Sentences about its fields that are not read."""


def batch(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: a line cannot be used; everything before it is written.
        FailedError: scoring failed, or the output cannot be written.
    """
    where = source(args)
    path = Path(args.input)
    if not path.is_file():
        raise InputError(f"{path} is not a file; a batch reads its input again to continue, so it takes no pipe")
    if path.resolve() == Path(args.output).resolve():
        raise InputError("the output must be another file than the input")
    if not Path(args.output).parent.is_dir():
        raise InputError(f"the folder {Path(args.output).parent} does not exist")
    with opened(path) as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        size = file.tell()
        options = {"input": digest.hexdigest(), "top_k": args.top_k, "instruction of requests": args.instruction}
        with Journal(Path(args.output), options | where.identity, overwrite=args.overwrite) as journal:
            _run(args, open_ranker(where), file, size, journal)
            journal.finish()


def _run(args: argparse.Namespace, ranker: Ranker, file: IO[bytes], size: int, journal: Journal) -> None:
    file.seek(0)
    read = _Reader(file, args, skip_to=journal.last)
    before = journal.lines
    bad = cut = queries = 0
    start = time.monotonic()
    with meter(size) as shown:
        if before:
            shown.say(f"continuing behind line {journal.last}: {before} lines are done")
        notes = Notes(shown.say)
        for line, outcome in _answers(ranker, read):
            notes.add(line.warnings, f"line {line.number}: ")
            if isinstance(outcome, Scored):
                record = {"results": [{"index": i, "score": outcome.scores[i]} for i in outcome.best(line.top_k)]}
                cut += outcome.truncated
                queries += outcome.query_truncated
                journal.write(line.number, {"id": line.id} | record)
                shown.advance(line.end, len(outcome.scores))
                continue
            if not isinstance(outcome, InvalidRequestError):
                raise FailedError(f"line {line.number}: {outcome}; run the same command again to continue")
            if not args.skip_bad:
                raise InputError(
                    f"line {line.number}: {outcome}; the {journal.lines} lines before it are done: "
                    f"run again with --skip-bad to continue (a mended input starts anew, with --overwrite)"
                )
            bad += 1
            shown.say(f"line {line.number} skipped: {outcome}")
            journal.write(line.number, {"id": line.id, "error": str(outcome)})
            shown.advance(line.end, 0)
        _sum_up(shown, journal.lines - before, bad, cut, time.monotonic() - start)
        if queries:
            shown.say(f"{queries} queries did not fit and were truncated (--max-seq-length)")


def _sum_up(shown: Meter, lines: int, bad: int, cut: int, seconds: float) -> None:
    shown.say(f"{lines} lines, {shown.documents} documents in {seconds:.1f} s ({shown.rate})")
    if bad:
        shown.say(f'{bad} bad lines were skipped; the output says "error" for each')
    if cut:
        shown.say(f"{cut} documents did not fit and were cut (--max-seq-length)")


def _answers(ranker: Ranker, read: _Reader) -> Iterator[tuple[Line, Scored | RerankError]]:
    """Each line with its outcome, in order: lines that hold no request wait for their turn as well."""
    for outcome in ranker.rank_many(read.requests()):
        yield from _bad(read.lines)
        yield read.lines.popleft(), outcome
    yield from _bad(read.lines)


def _bad(lines: deque[Line]) -> Iterator[tuple[Line, RerankError]]:
    while lines and lines[0].request is None:
        yield lines[0], InvalidRequestError(lines[0].error)
        lines.popleft()


class _Reader:
    """The input line by line; read in another thread than the one that takes `lines`."""

    def __init__(self, file: IO[bytes], args: argparse.Namespace, skip_to: int) -> None:
        self.file = file
        self.args = args
        self.skip_to = skip_to
        self.lines: deque[Line] = deque()
        """Read and not answered yet."""

    def requests(self) -> Iterator[RerankRequest]:
        """The requests of the good lines; ends at the first bad one, unless those are skipped."""
        end = 0
        for number, raw in enumerate(self.file, 1):
            end += len(raw)
            if number <= self.skip_to:
                continue
            line = self._line(number, end, raw)
            if line is None:
                continue
            self.lines.append(line)
            if line.request is not None:
                yield line.request
            elif not self.args.skip_bad:
                return

    def _line(self, number: int, end: int, raw: bytes) -> Line | None:
        body: Any = None
        try:
            content = decode(raw, "this", first=number == 1)
            if not content.strip():
                return None
            body = parse(content, "this")
            row = request_of(body, self.args.top_k, self.args.instruction)
            return Line(number, end, body.get("id"), row.request, row.top_k, warnings=row.warnings)
        except InputError as error:
            return Line(number, end, body.get("id") if isinstance(body, dict) else None, error=str(error))
