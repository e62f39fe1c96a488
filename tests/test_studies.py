"""Every study can still be imported, so that a renamed module or function of the project breaks none unnoticed."""

from __future__ import annotations

import importlib

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "studies").glob("[a-z]*.py")))
def test_a_study_can_be_imported(name: str) -> None:
    if name == "cluster":
        pytest.importorskip("ray", reason="needs the environment of `make test-ray`")
    importlib.import_module(f"studies.{name}")
