"""docs/clients.md is true: every block runs with the real package, and its last line gives the best document."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, ROOT, TOKEN

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "clients.md").read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[-1][:40] for block in BLOCKS])
def test_the_lines_of_a_client(url: str, block: str) -> None:
    code = ast.parse(block.replace("http://host:6006", url).replace("<token>", TOKEN))
    last = code.body.pop()
    assert isinstance(last, ast.Expr)
    names: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS}
    exec(compile(code, "clients.md", "exec"), names)
    assert eval(compile(ast.Expression(last.value), "clients.md", "eval"), names) in (BEST, DOCUMENTS[BEST])
