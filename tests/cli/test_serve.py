"""`serve`: the process that the command becomes. tests/deploy/test_package.py runs it from a wheel."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from reranker.cli.main import main
from reranker.root import ROOT as FILES
from tests.cli.command import cli, run_process
from tests.conftest import ROOT


@pytest.fixture
def replaced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, list[str], dict[str, str]]]:
    """The arguments of `os.execve`, which returns here."""
    calls: list[tuple[str, list[str], dict[str, str]]] = []
    monkeypatch.setattr("os.execve", lambda *arguments: calls.append(arguments))
    monkeypatch.chdir(tmp_path)
    return calls


def test_it_becomes_gunicorn_with_the_configuration_of_make_serve(
    replaced: list[tuple[str, list[str], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/other")
    main(["serve"])
    [(program, arguments, variables)] = replaced
    assert (program, FILES) == (sys.executable, ROOT)
    assert arguments == [sys.executable, "-m", "gunicorn", "-c", str(ROOT / "gunicorn.conf.py"), "app:app"]
    assert "gunicorn -c gunicorn.conf.py --pid" in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert variables["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "/other"]


def test_the_service_alone_reads_the_settings(
    replaced: list[tuple[str, list[str], dict[str, str]]], tmp_path: Path
) -> None:
    """So that its messages name their source, and SIGUSR2 reads `.env` again."""
    (tmp_path / ".env").write_text("PORT=7\nMODEL_DEVICE=nothing\nHF_HOME=/somewhere\n")
    main(["serve"])
    assert not {"PORT", "MODEL_DEVICE", "HF_HOME"} & set(replaced[0][2])


def test_modules_of_the_working_directory_are_not_taken_for_its_own(tmp_path: Path) -> None:
    for name in ("app", "config"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not the service')\n")
    (tmp_path / ".env").write_text("PORT=6006\nWORKERS=none\n")
    done = run_process("serve", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: WORKERS='none' cannot be used; ")
    assert done.stderr.endswith("(set in .env line 2)\n")


def test_settings_are_no_options(tmp_path: Path) -> None:
    err = cli("serve", "--port", "8000", cwd=tmp_path, code=2).stderr
    assert err == "error: unknown arguments: --port 8000 (see python -m reranker serve --help)\n"
    assert "PORT=8000 reranker serve" in cli("serve", "--help", cwd=tmp_path).stdout
