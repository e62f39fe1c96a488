"""The table of memory in docs/models.md is the one that `check --plan` prints."""

from __future__ import annotations

from reranker.cli.check import plan_table
from reranker.rankers.plan import memory_plan
from reranker.settings import ModelSettings
from tests.conftest import ROOT


def test_the_table_of_memory_is_the_printed_one() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = plan_table(memory_plan(ModelSettings()))
    assert f"\n\n{table}\n\n" in text
    assert table.count("Qwen3-Reranker") == 12
