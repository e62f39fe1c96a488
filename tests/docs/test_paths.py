"""The documents name only paths, modules and make targets that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

FOLDERS = ("benchmarks", "demo", "deploy", "docs", "reranker", "studies", "tests")
DOCUMENTS = [
    path
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks/RESULTS.md"])
    if path.name != "CHANGELOG.md"  # its releases name files of their time
]
_PATH = re.compile(rf"(?<![\w./:<>-])(?:{'|'.join(FOLDERS)})/[\w./*-]*[\w/*]")
_MODULE = re.compile(rf"python -m ((?:{'|'.join(FOLDERS)})(?:\.\w+)*)")
_TARGET = re.compile(r"(?:^    |`)make ([a-z-]+)", re.M)
_LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_exist(document: Path) -> None:
    missing = [name for name in _PATH.findall(text(document)) if not any(ROOT.glob(name.rstrip("/")))]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document: Path) -> None:
    targets = [target for target in _LINK.findall(text(document)) if not target.startswith("http")]
    assert not [target for target in targets if not (document.parent / target).exists()]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_and_make_targets_exist(document: Path) -> None:
    assert not [name for name in _MODULE.findall(text(document)) if importlib.util.find_spec(name) is None]
    targets = re.findall(r"^([a-z-]+):", text(ROOT / "Makefile"), re.M)
    assert not set(_TARGET.findall(text(document))) - set(targets)
