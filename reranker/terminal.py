"""Output for people: progress by rich, in terminals only, notes, and texts made harmless."""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from reranker.errors import FailedError

_LINE_SECONDS = 30.0
_NAME = 40
"""Characters of a name in a message."""
_NAMES = 20
"""Names in a message."""


def harmless(text: str) -> str:
    """`text` on one line, without what a terminal would obey (escape sequences) or cannot show."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


@functools.cache
def note(text: str) -> None:
    """Say on standard error what was decided for the user; the same only once."""
    print(f"note: {harmless(text)}", file=sys.stderr)


@contextmanager
def printing() -> Iterator[None]:
    """Write standard output inside, to its end.

    Raises:
        FailedError: it cannot be written, such as on a full disk; a reader that has enough is no such error.
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
    """Send what is left in the buffer of standard output nowhere: at the end Python would fail over it again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_json(value: object) -> None:
    """Write a value as a line of JSON; readable, where the encoding of standard output allows it.

    Raises:
        FailedError: see `printing`.
    """
    with printing():
        try:
            print(json.dumps(value, ensure_ascii=False))
        except UnicodeEncodeError:  # half a surrogate pair, or a terminal that is not UTF-8
            print(json.dumps(value))


def name_list(columns: Sequence[str]) -> str:
    """Names of columns for a message; the first line of a file without a heading may be long texts."""
    shown = [column if len(column) <= _NAME else f"{column[:_NAME]}..." for column in columns[:_NAMES]]
    return ", ".join([*shown, *([f"and {len(columns) - _NAMES} more"] if len(columns) > _NAMES else [])])


def plural(count: int, noun: str, several: str = "") -> str:
    """A count and its noun: 1 line, 2 lines; `several` is the plural that takes more than an s."""
    return f"{count} {noun if count == 1 else several or noun + 's'}"


def truncated(count: int, url: str | None, noun: str = "document", several: str = "") -> str:
    """The note on documents, or queries, that were too long."""
    limit = "the service's MAX_SEQ_LENGTH" if url else "--max-seq-length"
    return f"{plural(count, noun, several)} did not fit and {'was' if count == 1 else 'were'} truncated ({limit})"


@contextmanager
def loading(name: str, *, quiet: bool = False) -> Iterator[None]:
    """Say on standard error that a model is loaded inside: a spinner in a terminal, else a line.

    Args:
        name: the model, for people.
        quiet: no spinner, because something inside draws a bar of its own.
    """
    console = Console(stderr=True)
    if console.is_terminal and not quiet:
        with console.status(f"loading {escape(name)}..."):
            yield
    else:
        print(f"loading {name}...", file=sys.stderr, flush=True)
        yield


class Meter:
    """Documents per second and time left: a bar in a terminal, else a line every half minute. Standard error."""

    def __init__(self, progress: Progress, total: int, done: int) -> None:
        self.progress = progress
        self.total = total
        self.done = done
        self.documents = 0
        self.start = self.said = time.monotonic()
        self.task = progress.add_task("", total=total, completed=done, rate="")

    @property
    def rate(self) -> str:
        """Speed since the start."""
        return f"{self.documents / max(time.monotonic() - self.start, 1e-6):,.0f} documents/s"

    def advance(self, done: int, documents: int) -> None:
        """`done` of `total` is behind us; `documents` more were scored."""
        self.documents += documents
        self.done = done
        self.progress.update(self.task, completed=done, rate=self.rate)
        if not self.progress.console.is_terminal and time.monotonic() - self.said > _LINE_SECONDS:
            self.said = time.monotonic()
            self.say(f"{done / max(self.total, 1):.0%}, {self.documents} documents, {self.rate}")

    def say(self, line: str) -> None:
        """A line above the bar."""
        line = harmless(line)
        if self.progress.console.is_terminal:
            self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)


@contextmanager
def meter(total: int, done: int = 0) -> Iterator[Meter]:
    """A meter of `total` units of any kind, `done` of them in an earlier run."""
    console = Console(stderr=True)
    columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield Meter(progress, total, done)
