"""Ray as it runs for users (`serve run`), and a cluster of several nodes inside this process.

Everything listens on 127.0.0.1, starts no dashboard if Ray has an option for that, reports nothing, and ends with the
session.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from deploy.ray_serve import RAY_ENVIRONMENT
from tests.conftest import ROOT, Server, Start, start

__all__ = ["start"]  # the fixture

SERVE = str(Path(sys.executable).with_name("serve"))


@pytest.fixture(scope="session")
def ray_folder() -> Iterator[str]:
    """Yield a folder for Ray's sockets and logs; short, because the path of a socket has at most 107 characters."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def serve_run(start: Start, ray_folder: str) -> Start:
    """Return a `start` for `serve run` with the shipped config file, on a free port; `args` are those of the file."""

    def run(*, args: str = "", **others: Any) -> Server:
        changes = f"s/port: 6006/port: {{port}}/; s/0.0.0.0/127.0.0.1/; s/args: {{{{}}}}/args: {{{{{args}}}}}/"
        shell = f"sed '{changes}' {ROOT}/deploy/ray_serve.yaml > serve.yaml && exec {SERVE} run serve.yaml"
        return start(command=["sh", "-c", shell], RAY_TMPDIR=ray_folder, **RAY_ENVIRONMENT, **others)

    return run
