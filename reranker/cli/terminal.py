"""What people see: tables and progress by rich, in terminals only, and texts made harmless."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_LINE_SECONDS = 30.0


def harmless(text: str) -> str:
    """`text` on one line, without what a terminal would obey (escape sequences) or cannot show."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in text)


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
