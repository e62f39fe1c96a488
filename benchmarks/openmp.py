"""How OpenMP threads wait: asleep in processes that import the engine, by OpenMP's default in the peers' processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import reranker.engine  # before torch, here as in the service  # noqa: F401

OWN = {"GOMP_SPINCOUNT": "300000"}
"""libgomp's own choice where nothing is set; it comes before any policy. Read when a process loads torch."""


@contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """These variables for the processes that are started meanwhile; those that are None are unset."""
    before = dict(os.environ)
    for name, value in changes.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
