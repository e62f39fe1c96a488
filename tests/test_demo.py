"""The bundled model matches its card: small, loaded as any other, and good at the easy task it was made for."""

from __future__ import annotations

import json

import pytest

from reranker import Scorer
from tests.conftest import DEMO, ROOT

HELD_OUT = json.loads((ROOT / "demo" / "heldout.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def demo() -> Scorer:
    return Scorer.load(device="cpu", precision="float32")


def test_it_is_small_and_has_a_card() -> None:
    assert (DEMO / "model.safetensors").stat().st_size <= 12_000_000
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlicense: mit\n")
    assert not list(DEMO.glob("*.bin"))


@pytest.mark.parametrize(("language", "bar"), [("en", 0.85), ("zh", 0.8)])
def test_the_true_description_is_found_among_20(demo: Scorer, language: str, bar: float) -> None:
    """The first 20 tasks; demo/evaluate.py measures all of them."""
    part = HELD_OUT[language]
    ranks = []
    for task in part["tasks"][:20]:
        scores = demo.rerank(task["query"], [part["documents"][i] for i in task["documents"]])
        assert len(scores) == 20
        ranks.append(1 + sum(score > scores[task["answer"]] for score in scores))
    assert sum(1 / rank for rank in ranks) / len(ranks) >= bar


def test_the_card_states_the_scores_that_were_measured() -> None:
    scores = json.loads((DEMO / "scores.json").read_text())
    card = (DEMO / "README.md").read_text(encoding="utf-8")
    for language in ("en", "zh"):
        assert f"**{scores[language]['model']:.3f}**" in card
        assert f"{scores[language]['bm25']:.3f}" in card
