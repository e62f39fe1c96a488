"""The output of a batch, safe against every way to die: complete under its name, or not there.

    OUT.partial        the lines written so far; becomes OUT by a rename when the last one is there
    OUT.partial.json   what they were made from; another run may continue only with the same

A line is written with one call when it is scored, so a killed process loses nothing that it has scored. Every two
seconds the file is forced to the disk, so a power failure loses at most two seconds of lines; a torn last
line (half of one, or zeros) is truncated on the next start.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from reranker.errors import InputError
from reranker.rows.lines import dump, writing

_SYNC_SECONDS = 2.0


class Journal:
    """The unfinished output; a context manager.

    Args:
        path: the output.
        identity: the input and options that the output depends on; JSON values.
        overwrite: replace a finished output, and an unfinished one of another identity.
        unit: `line` or `row`, the key of the number in an output line.

    Attributes:
        last: number of the last input line or row that has its output line; 0: none.
        lines: how many output lines there are.

    Raises:
        InputError: the output exists, is being written by another process, or was begun with something else.
        FailedError: it cannot be written.
    """

    def __init__(self, path: Path, identity: dict[str, Any], *, overwrite: bool, unit: str = "line") -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.about = path.with_name(path.name + ".partial.json")
        self.unit = unit
        self.last = self.lines = 0
        self._mine = False
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already; give another name, or --overwrite")
        with writing(self.partial):
            self._file = open(self.partial, "ab", buffering=0)  # noqa: SIM115  # closed by close()
        try:
            self._begin(identity, overwrite)
        except BaseException:  # an interrupt too leaves no file open
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, line: int, record: dict[str, Any]) -> None:
        """The output of input line `line`.

        Raises:
            FailedError: the disk is full or gone.
        """
        data = dump({self.unit: line} | record)
        with writing(self.partial):
            while data:  # a signal or a nearly full disk may cut a write short
                data = data[self._file.write(data) :]
        self.last, self.lines = line, self.lines + 1
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force everything written to the disk."""
        with writing(self.partial):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Everything is there: give it its name."""
        self.sync()
        with writing(self.path):
            os.replace(self.partial, self.path)
            _sync_folder(self.path)
            self.about.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file. Lines that were written stay; a file without any is removed."""
        if not self.lines and self._mine:
            self.partial.unlink(missing_ok=True)
            self.about.unlink(missing_ok=True)
        self._file.close()

    def _begin(self, identity: dict[str, Any], overwrite: bool) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{self.partial} is being written by another process") from None
        self._synced = time.monotonic()
        other = _difference(self.about, identity) if self.partial.stat().st_size else None
        if other and not overwrite:
            raise InputError(f"{self.partial} was begun with {other}; use the same again, or --overwrite to start anew")
        with writing(self.partial):
            self._mine = True
            self._file.truncate(0 if other else self._recover())
            # The manifest is on the disk before the first line.
            draft = self.about.with_name(self.about.name + ".new")
            with open(draft, "wb") as file:
                file.write(dump(identity))
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, self.about)
            _sync_folder(self.path)

    def _recover(self) -> int:
        """Read what an earlier run left: bytes up to the last line before the first that is not whole."""
        good = 0
        with open(self.partial, "rb") as file:
            for raw in file:
                try:
                    number = json.loads(raw)[self.unit] if raw.endswith(b"\n") else 0
                except (ValueError, KeyError, TypeError):
                    break
                if not isinstance(number, int) or number <= self.last:
                    break
                self.last, self.lines, good = number, self.lines + 1, good + len(raw)
        return good


def _difference(about: Path, identity: dict[str, Any]) -> str | None:
    """Name the options in which an unfinished output differs from this run."""
    try:
        begun = json.loads(about.read_bytes())
        differs = [key for key in identity | begun if begun.get(key) != identity.get(key)]
    except (OSError, ValueError, TypeError, AttributeError):
        return "something unknown"
    return f"another {' and '.join(differs)}" if differs else None


def _sync_folder(path: Path) -> None:
    """Force a rename in the folder of `path` to the disk."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
