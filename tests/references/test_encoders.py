"""Encoders as sentence-transformers' CrossEncoder scores them: the engine gives the same logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from sentence_transformers import CrossEncoder

from tests.engine.checkpoints import settings
from tests.engine.encoders import KINDS
from tests.references.scores import DOCUMENTS, QUERIES, TOLERANCE, Engine, assert_equal, load, predict

LENGTH = 2048
"""Tokens of a pair: more than the longest here has."""


def saved_by_sentence_transformers(folder: Path, kind: str, **changes: int) -> Path:
    base = KINDS[kind](folder.with_name("base"), **changes)
    load(base).save_pretrained(str(folder), create_model_card=False)
    assert (folder / "modules.json").is_file()
    return folder


def with_old_settings(folder: Path, kind: str, **changes: int) -> Path:
    """Settings of sentence-transformers before 5.4, in config.json."""
    KINDS[kind](folder, **changes)
    settings(
        sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity", "version": "4.1.0"},
        sbert_ce_default_activation_function="torch.nn.modules.linear.Identity",
    )(folder)
    return folder


LAYOUTS: dict[str, Callable[..., Path]] = {
    "transformers": lambda folder, kind, **changes: KINDS[kind](folder, **changes),
    "sentence-transformers": saved_by_sentence_transformers,
    "sentence-transformers before 5.4": with_old_settings,
}


class Loaded(NamedTuple):
    """A folder as both sides load it."""

    reference: CrossEncoder
    engine: Engine


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=LAYOUTS)
def loaded(kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = LAYOUTS[request.param](tmp_path_factory.mktemp("encoder") / "model", kind, length=LENGTH)
    return Loaded(load(folder), Engine(folder))


@pytest.mark.parametrize("query", QUERIES.values(), ids=QUERIES)
def test_the_logits_of_a_request(loaded: Loaded, query: str) -> None:
    assert_equal(loaded.engine.logits(query, DOCUMENTS), predict(loaded.reference, query, DOCUMENTS))


def test_a_document_alone(loaded: Loaded) -> None:
    query = QUERIES["Chinese"]
    alone = [loaded.engine.logits(query, [document])[0] for document in DOCUMENTS]
    assert_equal(alone, predict(loaded.reference, query, DOCUMENTS))


def test_an_instruction_is_not_read(loaded: Loaded) -> None:
    query = QUERIES["a question"]
    assert not loaded.engine.scorer.info.reads_instruction
    assert loaded.engine.logits(query, DOCUMENTS, "Find code") == loaded.engine.logits(query, DOCUMENTS)


def test_two_labels_are_the_second_minus_the_first(kind: str, tmp_path: Path) -> None:
    folder = KINDS[kind](tmp_path / "model", num_labels=2, length=LENGTH)
    reference = predict(load(folder), QUERIES["a question"], DOCUMENTS)
    expected = [logits[1] - logits[0] for logits in reference]
    assert_equal(Engine(folder).logits(QUERIES["a question"], DOCUMENTS), expected)


@pytest.mark.parametrize("length", [64, 200])
def test_a_document_that_does_not_fit(kind: str, tmp_path: Path, length: int) -> None:
    """Both sides truncate the document, at the length that the folder says."""
    folder = KINDS[kind](tmp_path / "model", length=length)
    query, reference, engine = QUERIES["a question"], load(folder), Engine(folder)
    assert engine.scorer.info.max_seq_length == reference.max_seq_length == length
    assert_equal(engine.logits(query, DOCUMENTS), predict(reference, query, DOCUMENTS))


def test_a_query_longer_than_half_of_the_pair_is_kept(kind: str, tmp_path: Path) -> None:
    """docs/models.md names the difference: sentence-transformers truncates the longer text, and so this query."""
    folder = KINDS[kind](tmp_path / "model", length=256)
    query, long = QUERIES["60 words"], DOCUMENTS[-1:]
    reference, found = load(folder), Engine(folder).logits(QUERIES["60 words"], long)
    inputs = reference.tokenizer([query], long, truncation="only_second", max_length=256, return_tensors="pt")
    with torch.inference_mode():
        expected = float(reference.model(**inputs).logits)
    assert found == pytest.approx([expected], abs=TOLERANCE)
    assert abs(predict(reference, query, long)[0] - expected) > 100 * TOLERANCE


def test_the_activation_of_the_folder_is_not_applied_to_logits(loaded: Loaded, tmp_path: Path) -> None:
    """A score is the sigmoid of the logit, whatever the folder names."""
    query = QUERIES["a question"]
    raw = torch.tensor(loaded.engine.logits(query, DOCUMENTS[:3]))
    found = loaded.engine.scorer.rerank(query, DOCUMENTS[:3])
    assert found == pytest.approx(raw.sigmoid().tolist(), abs=1e-6)
