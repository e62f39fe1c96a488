"""Checks of the output files of `evaluate` before the model is loaded, so that a bad name does not lose the scores."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from reranker.errors import FailedError, InputError


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str | Path]) -> None:
    """Refuse outputs (option -> path) that would replace an input or one another, or that cannot be written.

    Raises:
        InputError: a path is empty, a folder, an input, or another output; or its folder does not exist.
        FailedError: the permissions do not allow writing.
    """
    taken = {_identity(Path(path)): f"the input {path}" for path in inputs}
    for option, name in outputs.items():
        if name is None:
            continue
        path = Path(name)
        if not name or path.is_dir():
            raise InputError(f"{option}={name!r} names no file")
        if not path.parent.is_dir():
            raise InputError(f"{option}={name}: the folder {path.parent} does not exist")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise FailedError(f"cannot write {name} ({option}): Permission denied")
        if path.exists() and not path.is_file():  # a device or a pipe has no content to replace
            continue
        if other := taken.get(_identity(path)):
            raise InputError(f"{option}={name} would replace {other}; name another file")
        taken[_identity(path)] = f"the output of {option}"


def _identity(path: Path) -> object:
    """Return the same value for all names of a file, symbolic and hard links included."""
    try:
        status = path.stat()
    except OSError:
        return path.resolve()
    return status.st_dev, status.st_ino
