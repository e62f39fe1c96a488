"""docs/faults.md is true: every row names a test, and every test that is named exists."""

from __future__ import annotations

import ast
import re

import pytest

from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = [line for line in TEXT.splitlines() if line.startswith("|")]
_TEST = r"`(tests/[\w/]+\.py)::(test_\w+)`"


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_there_are_tables() -> None:
    heads = [i for i, row in enumerate(ROWS) if set(row) == set("|-")]
    assert len(heads) >= 2
    assert all(cells(ROWS[i - 1])[-1] == "test" for i in heads)


@pytest.mark.parametrize(
    "row",
    [row for row in ROWS if set(row) != set("|-") and cells(row)[-1] != "test"],
    ids=lambda row: cells(row)[0][:40],
)
def test_every_row_says_what_happens_and_names_tests_that_exist(row: str) -> None:
    fault, outcome, tests = cells(row)
    assert fault
    assert outcome
    assert re.fullmatch(rf"{_TEST}(, {_TEST})*", tests), tests
    for file, name in re.findall(_TEST, tests):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file} has no {name}"
