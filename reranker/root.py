"""The folder of the files beside the package: `app.py`, `config.py`, `gunicorn.conf.py` and `models/demo`."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_INSTALLED = _PACKAGE / "_root"  # a wheel has them inside the package (pyproject.toml)

ROOT = _INSTALLED if _INSTALLED.is_dir() else _PACKAGE.parent
INSTALL_EVAL = "-m pip install " + (
    "'qwen3-reranker-service[eval]'" if ROOT is _INSTALLED else "-r requirements-eval.txt"
)
"""The arguments of Python that install the packages for `evaluate` and Parquet."""
