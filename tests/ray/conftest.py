"""Ray as it runs for users (`serve run`), and a cluster of several nodes inside this process.

Everything listens on 127.0.0.1, starts no dashboard where that can be said, reports nothing, and ends with the session.
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
    """Where Ray keeps sockets and logs; short, for a socket's path has 107 characters at most."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def serve_run(start: Start, ray_folder: str) -> Start:
    """`serve run` of the config file that ships, on a free port. Arguments as for `start`, and `args`: Serve's own."""

    def run(*, args: str = "", **others: Any) -> Server:
        changes = f"s/port: 6006/port: {{port}}/; s/0.0.0.0/127.0.0.1/; s/args: {{{{}}}}/args: {{{{{args}}}}}/"
        shell = f"sed '{changes}' {ROOT}/deploy/ray_serve.yaml > serve.yaml && exec {SERVE} run serve.yaml"
        return start(command=["sh", "-c", shell], RAY_TMPDIR=ray_folder, **RAY_ENVIRONMENT, **others)

    return run
