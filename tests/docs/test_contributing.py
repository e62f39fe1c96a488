"""The map in CONTRIBUTING.md: each kind of addition has a line, and the paths on it exist."""

from __future__ import annotations

import re

import pytest

from tests.conftest import ROOT

ADDITIONS = {"dialect", "setting", "metric", "model family", "request field", "command"}
LINES = [
    line for line in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines() if line.startswith("- To add ")
]


def parse(line: str) -> tuple[str, list[str]]:
    """Split "- To add a NAME: `path`, `path`." into the name and the paths."""
    match = re.fullmatch(r"- To add an? ([a-z ]+): ((?:`[\w./-]+`, )*`[\w./-]+`)\.", line)
    assert match is not None, f"not of the form '- To add a NAME: `path`, `path`.': {line}"
    return match[1], re.findall(r"`([^`]+)`", match[2])


def test_every_kind_of_addition_has_one_line() -> None:
    assert sorted(parse(line)[0] for line in LINES) == sorted(ADDITIONS)


@pytest.mark.parametrize("line", LINES)
def test_the_paths_on_a_line_exist(line: str) -> None:
    _, paths = parse(line)
    for path in paths:
        target = (ROOT / path).resolve()
        assert target.is_relative_to(ROOT), path
        assert target.is_dir() if path.endswith("/") else target.is_file(), path
