"""docs/scale.md says what benchmarks/capacity.py computes, and that computes from true shapes."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from benchmarks import capacity
from reranker import Scorer
from reranker.engine import warmup
from studies.simulate import LOADS, POLICIES
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "scale.md").read_text()


def test_the_document_has_the_computed_tables() -> None:
    for table in capacity.tables().split("\n\n"):
        assert table in TEXT, "python -m benchmarks.capacity prints what docs/scale.md must say"


@pytest.mark.parametrize("name", capacity.MODELS)
def test_parameters_are_those_that_transformers_counts(name: str) -> None:
    it = capacity.models()[name]
    config = Qwen3Config(
        vocab_size=capacity.VOCABULARY,
        hidden_size=it.hidden,
        intermediate_size=it.intermediate,
        num_hidden_layers=it.layers,
        num_attention_heads=it.heads,
        num_key_value_heads=it.kv_heads,
        head_dim=it.head_dim,
        tie_word_embeddings=it.tied,
    )
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    assert it.parameters == model.num_parameters()
    matrices = [p.numel() for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2]
    assert it.flop == 2 * sum(matrices)


def test_the_budget_is_chosen_by_the_engines_constants() -> None:
    chosen = capacity.BATCH_SECONDS, capacity.MAX_BATCH_TOKENS
    assert chosen == (warmup.BATCH_SECONDS, warmup.MAX_BATCH_TOKENS)


def test_activations_are_estimated_as_the_engine_does(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        Scorer.load(model_path, device="cpu", precision="float32")
    [record] = [r for r in caplog.records if r.msg.startswith("token budget")]
    assert isinstance(record.args, tuple)
    config = AutoConfig.from_pretrained(str(model_path))
    it = capacity.Model(
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.tie_word_embeddings,
    )
    float32, bfloat16 = 4, 2
    assert record.args[6] == pytest.approx(it.activation_bytes / 1024 * float32 / bfloat16)


def test_the_document_shows_the_published_simulation() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text().partition("### 1,000 GPUs")[2].partition("###")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.splitlines() if "% |" in line]
    found = {(load, name): [*times, f"{float(share[:-1]):.0f}%"] for load, name, *times, share, _ in rows}
    assert set(found) == {(f"{load:.0%}", name) for load in LOADS for name in POLICIES}
    [head] = re.findall(r"^\| policy \| (load .*) \|$", TEXT, re.M)
    loads = [column.removeprefix("load ") for column in head.split(" | ")]
    for name in POLICIES:
        cells = [" / ".join(found[load, name]) for load in loads]
        assert f"| {name} | {' | '.join(cells)} |" in TEXT


def test_the_document_shows_the_published_comparison() -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text().partition("against a real gunicorn")[2]
    table = results[results.index("| GPUs |") :].partition("\n\n")[0]
    assert len(table.splitlines()) == 5
    assert table in TEXT
