"""Who imports whom: the arrows of the architecture, so that the engine stays usable alone and no cycle can form."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

WEB = {"fastapi", "starlette", "uvicorn", "gunicorn", "pydantic", "httptools", "uvicorn_worker", "dotenv"}
COMPUTE = {"torch", "transformers", "numpy", "tokenizers", "safetensors"}


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it is loaded; what TYPE_CHECKING guards does not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(n)
        for i in ast.walk(tree)
        if isinstance(i, ast.If) and "TYPE_CHECKING" in ast.unparse(i.test)
        for n in ast.walk(i)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_threads_sleep_while_they_wait_unless_told_otherwise(given: str | None) -> None:
    """OpenMP reads it when torch is loaded, so it must be there before, in whatever imports the engine."""
    code = "import os, sys, app; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [given or "PASSIVE", "False"]


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


ENGINE = sorted((ROOT / "reranker" / "engine").glob("*.py"))
SERVICE = sorted((ROOT / "reranker" / "service").rglob("*.py"))


@pytest.mark.parametrize("path", ENGINE, ids=lambda p: p.name)
def test_the_engine_knows_no_service_and_no_web(path: Path) -> None:
    names = imports(path)
    assert not any(name.startswith("reranker.service") for name in names)
    assert not top(names) & (WEB | {"config", "app"})


@pytest.mark.parametrize("path", SERVICE, ids=lambda p: p.name)
def test_the_service_reaches_the_engine_only_where_it_is_free_of_torch(path: Path) -> None:
    names = imports(path)
    assert not top(names) & (COMPUTE | {"config", "app"})
    engine = {name for name in names if name.startswith("reranker.engine")}
    assert engine <= {"reranker.engine.budget", "reranker.engine.scores", "reranker.engine.text"}


def test_the_request_schema_serves_the_service_and_the_command_line_alike() -> None:
    names = {name for file in ("request", "fields") for name in imports(ROOT / "reranker" / f"{file}.py")}
    assert top(names) <= sys.stdlib_module_names | {"reranker"}
    leaves = {f"reranker.{name}" for name in ("engine.text", "errors", "template", "types", "unread", "fields")}
    assert {name for name in names if name.startswith("reranker")} == leaves


@pytest.mark.parametrize("name", ["types", "errors", "template", "notes", "unread"])
def test_types_and_errors_are_leaves(name: str) -> None:
    assert top(imports(ROOT / "reranker" / f"{name}.py")) <= sys.stdlib_module_names


def test_the_application_starts_without_torch() -> None:
    """So that /health answers from the first second; torch comes with the model, in the background."""
    code = "import sys, app; print('torch' in sys.modules, 'transformers' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]
