"""LoRA adapters as peft writes them: the engine gives the logits of the adapted model, merged or not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.card import Card
from tests.references.checkpoints import adapter, causal, classifier
from tests.references.scores import DOCUMENTS, QUERIES, Engine, assert_equal

QUERY = QUERIES["a question"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "all projections": {},
    "attention": {"target_modules": ["q_proj", "v_proj"], "r": 8, "lora_alpha": 4},
    "rank-stabilised": {"use_rslora": True},
    "one layer": {"target_modules": PROJECTIONS, "layers_to_transform": [1]},
    "ranks by pattern": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 32}},
    "the head too": {"modules_to_save": ["lm_head"]},
}
CASES = [*((settings, False) for settings in ADAPTERS.values()), ({}, True)]
"""Settings of the adapter, and whether the base's head is tied."""


def of_all(score: Callable[[str, str], float]) -> list[float]:
    return [score(QUERY, document) for document in DOCUMENTS]


def differ(before: list[float], after: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1


@pytest.mark.parametrize(("settings", "tied"), CASES, ids=[*ADAPTERS, "tied"])
def test_an_adapter_of_the_language_model(tmp_path: Path, settings: dict[str, Any], tied: bool) -> None:
    base = causal(tmp_path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    folder = adapter(tmp_path / "adapter", base, model, TaskType.CAUSAL_LM, **settings)
    card = Card(base)
    before = of_all(card.logit)
    card.model = PeftModel.from_pretrained(card.model, str(folder)).eval()
    unmerged = of_all(card.logit)
    card.model = card.model.merge_and_unload().eval()
    assert differ(before, unmerged)
    ours = Engine(folder).logits(QUERY, DOCUMENTS)
    assert_equal(ours, unmerged)
    assert_equal(ours, of_all(card.logit))


@pytest.mark.parametrize("build", [causal, classifier], ids=["of the language model", "of a classifier"])
def test_an_adapter_with_a_classification_head(tmp_path: Path, build: Callable[[Path], Path]) -> None:
    base = build(tmp_path / "base")

    def head() -> Any:
        return AutoModelForSequenceClassification.from_pretrained(str(base), num_labels=1, dtype=torch.float32).eval()

    folder = adapter(tmp_path / "adapter", base, head(), TaskType.SEQ_CLS)
    card = Card(base if build is causal else causal(tmp_path / "words"))  # for its tokens
    model = PeftModel.from_pretrained(head(), str(folder)).eval()

    @torch.inference_mode()
    def logit(query: str, document: str) -> float:
        return float(model(input_ids=torch.tensor([card.ids(query, document)])).logits)

    unmerged = of_all(logit)
    model = model.merge_and_unload().eval()
    ours = Engine(folder).logits(QUERY, DOCUMENTS)
    assert_equal(ours, unmerged)
    assert_equal(ours, of_all(logit))
