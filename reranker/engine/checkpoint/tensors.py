"""Read a *.safetensors: the shape and type of its tensors, and their values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from reranker.errors import ModelLoadError

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str
    """In safetensors' notation: F32, BF16, ..."""

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of a value; 1 for the types of quantised weights."""
        return FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 1


def read_header(file: Path) -> dict[str, Stored]:
    """Return every tensor of a *.safetensors by name.

    Raises:
        ModelLoadError: the file is broken.
    """
    stored: dict[str, Stored] = {}
    with opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dictionary
            part = tensors.get_slice(name)
            stored[name] = Stored(tuple(part.get_shape()), str(part.get_dtype()))
    return stored


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a *.safetensors.

    Raises:
        ModelLoadError: the file is broken, also where it is read inside the context.
    """
    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is broken or half downloaded ({error}): download it again") from error
