"""The origin of scores, and the values by which an interrupted batch recognizes it."""

from __future__ import annotations

from pathlib import Path

import pytest

from reranker.rankers.source import Source
from reranker.settings import ModelSettings


def test_a_model_is_known_by_the_values_that_change_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {"model": None, "revision": None, "precision": "auto", "max_seq_length": 8192, "instruction": None}
    assert Source(model=ModelSettings(batch_size=3, model_device="cpu")).identity == expected
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert Source(model=ModelSettings(model_name_or_path="mine")).identity["model"] == str(tmp_path / "mine")
    assert Source(model=ModelSettings(model_name_or_path="Qwen/X")).identity["model"] == "Qwen/X"


def test_a_service_is_known_by_its_url() -> None:
    assert Source("http://h", "token").identity == {"url": "http://h"}
