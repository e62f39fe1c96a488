"""LoRA adapters as peft writes them: the engine gives the logits of the adapted model, merged or not."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, TaskType
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from benchmarks.card import Card
from reranker.errors import ModelLoadError
from tests.references.checkpoints import adapter, causal, classifier
from tests.references.scores import DOCUMENTS, QUERIES, Engine, assert_equal

QUERY = QUERIES["a question"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MERGED: dict[str, tuple[dict[str, Any], bool]] = {
    "all projections": ({}, False),
    "all projections, a tied head": ({}, True),
    "rank-stabilised": ({"use_rslora": True, "r": 8, "lora_alpha": 4}, False),
    "one layer": ({"target_modules": PROJECTIONS, "layers_to_transform": [1]}, False),
    "names by an expression": ({"target_modules": r".*\.layers\.0\..*(q|v)_proj"}, False),
    "a saved head": ({"modules_to_save": ["lm_head"]}, False),
    "a saved norm": ({"modules_to_save": ["norm", "q_norm"]}, True),
    "a saved embedding and head that were tied": ({"modules_to_save": ["embed_tokens", "lm_head"]}, True),
}
"""Settings of the adapter, and whether the base's head is tied."""
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "ranks by pattern": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "biases": ({"bias": "lora_only"}, "bias='lora_only'"),
    "single tokens": ({"trainable_token_indices": [5, 9]}, "trainable_token_indices"),
    "an adapted embedding": ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "changes the base's weights"),
}
"""Settings of the adapter, and words of the error."""


def of_all(score: Callable[[str, str], float]) -> list[float]:
    return [score(QUERY, document) for document in DOCUMENTS]


def differ(before: list[float], after: list[float]) -> bool:
    return max(abs(a - b) for a, b in zip(before, after, strict=True)) > 0.1


def language_adapter(path: Path, settings: dict[str, Any], *, tied: bool) -> tuple[Path, Path]:
    base = causal(path / "base", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    return base, adapter(path / "adapter", base, model, TaskType.CAUSAL_LM, **settings)


@pytest.mark.parametrize(("settings", "tied"), MERGED.values(), ids=MERGED)
def test_an_adapter_of_the_language_model(tmp_path: Path, settings: dict[str, Any], tied: bool) -> None:
    base, folder = language_adapter(tmp_path, settings, tied=tied)
    card = Card(base)
    before = of_all(card.logit)
    card.model = PeftModel.from_pretrained(card.model, str(folder)).eval()
    unmerged = of_all(card.logit)
    card.model = card.model.merge_and_unload().eval()
    assert differ(before, unmerged)
    ours = Engine(folder).logits(QUERY, DOCUMENTS)
    assert_equal(ours, unmerged)
    assert_equal(ours, of_all(card.logit))


def test_an_adapted_head_that_was_tied_is_that_of_the_unmerged_model(tmp_path: Path) -> None:
    """peft's own merge of it (0.21.2, with a warning) adds the head's change to the embedding too."""
    base, folder = language_adapter(tmp_path, {"target_modules": ["q_proj", "lm_head"]}, tied=True)
    card = Card(base)
    card.model = PeftModel.from_pretrained(card.model, str(folder)).eval()
    assert_equal(Engine(folder).logits(QUERY, DOCUMENTS), of_all(card.logit))


@pytest.mark.parametrize(("settings", "words"), REFUSED.values(), ids=REFUSED)
def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    _, folder = language_adapter(tmp_path, settings, tied=True)
    with pytest.raises(ModelLoadError, match=re.escape(words)):
        Engine(folder)


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
