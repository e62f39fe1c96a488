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
def test_the_application_starts_without_torch_and_its_threads_will_sleep_unless_told_otherwise(
    given: str | None,
) -> None:
    """/health answers from the first second, and torch comes with the model, in the background.

    OpenMP reads its variable when torch is loaded, so it must be there before, in whatever imports the engine.
    """
    code = "import os, sys, app; print(os.environ['OMP_WAIT_POLICY'], {'torch', 'transformers'} & set(sys.modules))"
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {"OMP_WAIT_POLICY": given} if given else {}
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [given or "PASSIVE", "set()"]


def top(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


ALLOWED: dict[str, str] = {
    "types": "",
    "errors": "",
    "text": "",
    "cgroup": "",
    "notes": "",
    "environment": "",
    "root": "",
    "settings": "environment",
    "terminal": "errors",
    "request": "errors text types",
    "engine": "cgroup errors request root text types",
    "rankers": "engine errors notes settings terminal types",
    "rows": "errors notes request root terminal types",
    "batch": "engine errors notes rankers request rows settings terminal types",
    "evaluate": "errors rankers request rows terminal types",
    "cli": "batch environment errors evaluate rankers request root rows settings terminal types",
    "scheduler": "errors types",
    "http": "errors notes request scheduler types",
    "server": "cgroup errors http",
}
"""For each module or package of `reranker`, those that it imports; __init__ and __main__ aside."""
FREE_OF_TORCH = {"reranker.engine.budget", "reranker.engine.scores"}
"""The modules of the engine that every package may import."""
LIBRARIES: dict[str, set[str]] = {
    **{name: set() for name in ("types", "errors", "text", "cgroup", "notes", "root", "request", "scheduler")},
    "engine": COMPUTE | {"huggingface_hub", "psutil"},
}
"""The libraries that a package imports, where it is not free to import any."""


def rooms() -> list[tuple[str, Path]]:
    """Each module of `reranker` with the name of its package."""
    files = [path for path in sorted((ROOT / "reranker").rglob("*.py")) if "__pycache__" not in path.parts]
    named = [(path.relative_to(ROOT / "reranker").parts[0].removesuffix(".py"), path) for path in files]
    return [(room, path) for room, path in named if not room.startswith("__")]


def test_every_package_has_its_arrows() -> None:
    assert {room for room, _ in rooms()} == set(ALLOWED)


@pytest.mark.parametrize(("room", "path"), rooms(), ids=lambda value: str(value).removeprefix(f"{ROOT}/"))
def test_a_module_imports_only_from_the_packages_below_its_own(room: str, path: Path) -> None:
    names = imports(path)
    ours = {name for name in names if name.startswith("reranker.")} - FREE_OF_TORCH
    assert {name.split(".")[1] for name in ours} <= {room, *ALLOWED[room].split()}
    assert not top(names) & {"config", "app", "deploy", "tests"}
    if room in LIBRARIES:
        assert top(names) - {"reranker"} <= sys.stdlib_module_names | LIBRARIES[room]
    if room not in ("environment", "settings", "http", "server"):
        assert not top(names) & WEB
    if room not in ("engine", "batch"):
        assert not top(names) & (COMPUTE - {"numpy"})


def test_no_modules_import_each_other() -> None:
    graph = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): imports(path)
        for _, path in rooms()
    }
    seen: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"an import cycle: {' -> '.join((*above, name))}"
        if name not in seen:
            for other in sorted(graph.get(name, set()) & set(graph)):
                visit(other, (*above, name))
            seen.add(name)

    for name in graph:
        visit(name, ())
