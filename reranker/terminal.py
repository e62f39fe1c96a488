"""Output for people: progress bars by rich in terminals, notes, and texts without control characters."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from reranker.errors import FailedError

_LINE_SECONDS = 30.0
MAX_NAME = 40
"""Characters of a name in a message."""
MAX_NAMES = 20
"""Names in a message."""


def harmless(text: str) -> str:
    """Return `text` on one line, without escape sequences and unprintable characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


@functools.cache
def note(text: str) -> None:
    """Print an automatic choice on standard error, each text once."""
    print(f"note: {harmless(text)}", file=sys.stderr)


@contextmanager
def printing() -> Iterator[None]:
    """Write standard output in the block, and flush it.

    Raises:
        FailedError: it is closed, or cannot be written, such as on a full disk.
        BrokenPipeError: the reader closed the pipe.
    """
    if sys.stdout is None:
        raise FailedError("standard output is closed; the result has no place to go")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        discard_output()
        raise FailedError(f"cannot write standard output: {error.strerror or error}") from None


def discard_output() -> None:
    """Discard the buffer of standard output, which Python would try to flush again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_result(value: object, table: Callable[[], None], output: str = "auto") -> None:
    """Print the result of a command: `table()` for people, else `value` as a line of JSON; see `printing`.

    `output` is `table`, `json`, or `auto` for a table in a terminal only.
    """
    with printing():
        if output == "table" or (output == "auto" and sys.stdout.isatty()):
            table()
            return
        try:
            print(json.dumps(value, ensure_ascii=False))
        except UnicodeEncodeError:  # a lone surrogate, or a terminal that is not UTF-8
            print(json.dumps(value))


def name_list(columns: Sequence[str]) -> str:
    """Return names of columns for a message, shortened: the first line of a file without a heading may be texts."""
    shown = [column if len(column) <= MAX_NAME else f"{column[:MAX_NAME]}..." for column in columns[:MAX_NAMES]]
    return ", ".join([*shown, *([f"and {len(columns) - MAX_NAMES} more"] if len(columns) > MAX_NAMES else [])])


def plural(count: int, noun: str, several: str = "") -> str:
    """Return a count and its noun: 1 line, 2 lines; `several` is an irregular plural."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def truncated(count: int, url: str | None, noun: str = "document", several: str = "") -> str:
    """Return the note on truncated documents or queries."""
    limit = "the service's MAX_SEQ_LENGTH" if url else "--max-seq-length"
    return f"{plural(count, noun, several)} did not fit and {'was' if count == 1 else 'were'} truncated ({limit})"


@contextmanager
def loading(name: str, *, quiet: bool = False) -> Iterator[None]:
    """Print on standard error that a model is loaded in the block: in a terminal a spinner, unless `quiet`."""
    if sys.stderr.isatty() and not quiet:
        with waiting(f"loading {name}"):
            yield
    else:
        print(f"loading {name}...", file=sys.stderr, flush=True)
        yield


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show a spinner on standard error during the block; in a pipe nothing."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with console.status(f"{escape(text)}..."):
        yield


class Meter:
    """Progress on standard error: a bar in a terminal, else a line every 30 seconds."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress = progress
        self.total = total
        self.done = 0
        self.documents = 0
        self.start = self._last_line = time.monotonic()
        self.task = progress.add_task("", total=total, rate="")

    @property
    def rate(self) -> str:
        """Documents per second since the start."""
        return f"{self.documents / max(time.monotonic() - self.start, 1e-6):,.0f} documents/s"

    def advance(self, done: int, documents: int) -> None:
        """Set the units that are done, of `total`, and count `documents` more."""
        self.documents += documents
        self.done = done
        self.progress.update(self.task, completed=done, rate=self.rate)
        if not self.progress.console.is_terminal and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            self.say(f"{done / max(self.total, 1):.0%}, {self.documents} documents, {self.rate}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        line = harmless(line)
        if self.progress.console.is_terminal:
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def meter(total: int) -> Iterator[Meter]:
    """Show the progress of `total` units of any kind."""
    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Meter(progress, total)
