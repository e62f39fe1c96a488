"""docs/clients.md is true: every Python block is a program whose last line gives the best document."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import BEST, DOCUMENTS, QUERY, ROOT, TOKEN

TEXT = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
PRODUCTS = ("agno", "dify_plugin", "lancedb", "lightrag", "mem0")
RUN = """
import ast, sys

query, *documents = sys.argv[1:]
code = ast.parse(sys.stdin.read())
last = ast.Expression(code.body.pop().value)
exec(compile(code, "clients.md", "exec"))
print("best:", repr(eval(compile(last, "clients.md", "eval"))))
"""


def imports(block: str) -> set[str]:
    return set(re.findall(r"^(?:import|from) (\w+)", block, re.M))


def parameter(block: str) -> object:
    if imports(block) & set(PRODUCTS):
        marks = [pytest.mark.products]
    else:
        marks = [pytest.mark.cohere] if "cohere" in imports(block) else []
    return pytest.param(block, marks=marks, id=block.splitlines()[-1][:40])


@pytest.mark.parametrize("block", [parameter(block) for block in BLOCKS])
def test_the_lines_of_a_client(block: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("url" if "<token>" in block else "open_url")
    program = block.replace("http://host:6006", url).replace("<token>", TOKEN)
    command = [sys.executable, "-c", RUN, QUERY, *DOCUMENTS]
    got = subprocess.run(command, input=program, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert got.returncode == 0, got.stderr
    assert got.stdout.splitlines()[-1] in (f"best: {BEST}", f"best: {DOCUMENTS[BEST]!r}")


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.glob("requirements*.txt")), ids=lambda path: path.name)
def test_every_package_has_a_row(path: Path) -> None:
    table = "\n".join(line for line in TEXT.splitlines() if line.startswith("| "))
    names = re.findall(r"^([\w-]+)==", path.read_text(encoding="utf-8"), re.M)
    rows = [name.replace("llama-index-postprocessor-", "llama-index ").removesuffix("-ai") for name in names]
    assert [name for name in rows if name not in table and name != "pytest"] == []
