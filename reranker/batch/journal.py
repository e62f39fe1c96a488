"""An output of one part on the local disk, written line by line: complete under its name, or not there.

    OUT.partial        the lines written so far; renamed to OUT after the last one
    OUT.partial.json   the manifest; another run continues only with the same

Each line is one write when it is scored, so a killed process loses no scored line. The file is forced to the disk every
two seconds, so a power failure loses at most two seconds of lines; the next start truncates a torn last line (half of
one, or zeros).
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from reranker.batch.manifest import continues
from reranker.errors import InputError
from reranker.rows.lines import dump, writing

_SYNC_SECONDS = 2.0


class Journal(AbstractContextManager["Journal"]):
    """The unfinished output; `overwrite` replaces a finished one, and an unfinished one with another manifest.

    Attributes:
        unit: `line` or `row`, the key of the number in an output line.
        last: number of the last input line or row that has an output line; 0: none.
        lines: count of output lines.

    Raises:
        InputError: the output exists, is being written by another process, or has another manifest.
        FailedError: the disk is full or gone.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, overwrite: bool, unit: str = "line") -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self.manifest_path = path.with_name(path.name + ".partial.json")
        self.unit = unit
        self.last = self.lines = 0
        if path.exists() and not overwrite:
            raise InputError(f"{path} exists already; give another name, or --overwrite")
        with writing(self.partial):
            self._file = open(self.partial, "ab", buffering=0)  # noqa: SIM115  # closed by close()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise InputError(f"{self.partial} is being written by another process") from None
        try:
            with writing(self.partial):
                self._begin(manifest, overwrite)
        except BaseException:  # an interrupt leaves no open file either
            self.close()
            raise

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, number: int, record: dict[str, Any]) -> None:
        """Append the record of input line or row `number`; see `writing` for errors."""
        data = dump({self.unit: number} | record)
        with writing(self.partial):
            while data:  # a signal or a nearly full disk may shorten a write
                data = data[self._file.write(data) :]
        self.last, self.lines = number, self.lines + 1
        if time.monotonic() - self._synced > _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Force all lines to the disk."""
        with writing(self.partial):
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def finish(self) -> None:
        """Rename the complete output to its name."""
        self.sync()
        with writing(self.path):
            self.partial.replace(self.path)
            _sync(self.path.parent)
            self.manifest_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; delete it if it is empty."""
        with self._file:  # it holds the lock
            if not os.fstat(self._file.fileno()).st_size:
                self.partial.unlink(missing_ok=True)
                self.manifest_path.unlink(missing_ok=True)

    def _begin(self, manifest: dict[str, Any], overwrite: bool) -> None:
        content = None
        with suppress(OSError):
            content = self.manifest_path.read_bytes()
        resumed = self.partial.stat().st_size > 0 and continues(
            content, manifest, str(self.partial), overwrite=overwrite
        )
        self._file.truncate(self._whole_bytes() if resumed else 0)
        self.sync()
        if not resumed:  # on the disk between the last line of another manifest and the first line of this one
            self.manifest_path.write_bytes(dump(manifest))
            _sync(self.manifest_path)
            _sync(self.path.parent)

    def _whole_bytes(self) -> int:
        """Read the lines of an earlier run, up to the first that is not whole; return their size."""
        size = 0
        with open(self.partial, "rb") as file:
            for line in file:
                try:
                    number = json.loads(line)[self.unit] if line.endswith(b"\n") else 0
                except (ValueError, KeyError, TypeError):
                    break
                if not isinstance(number, int) or number <= self.last:
                    break
                self.last, self.lines, size = number, self.lines + 1, size + len(line)
        return size


def _sync(path: Path) -> None:
    """Force a file, or the renames in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
