"""`serve`: become gunicorn with the service's configuration, as `make serve` starts it, from a checkout or a wheel."""

from __future__ import annotations

import argparse
import os
import sys

from reranker.root import ROOT


def serve(args: argparse.Namespace) -> None:
    """Replace this process: signals, process id and exit code are gunicorn's; settings are read by the service."""
    command = [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "app:app"]
    os.execve(sys.executable, command, os.environ | _search_path())


def _search_path() -> dict[str, str]:
    """Return the variables under which `app` and `config` are the service's.

    The working directory often has modules of these names. Python would put it first on the path, and so would
    gunicorn, whose configuration moves it to the end.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONSAFEPATH": "1"}
