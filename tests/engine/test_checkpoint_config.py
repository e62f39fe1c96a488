"""Every variant of a checkpoint gives the card's scores, or one line with the cause and the way out."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest

from benchmarks.card import INSTRUCTION, Card
from reranker import ModelLoadError, Scorer
from reranker.types import RerankRequest, Slice
from tests.engine.checkpoints import RIGHT, WRONG, Variant, sentence_transformers, small_model

PAIRS = [
    ("how to compress files", "gzip compresses files"),
    ("how to compress files", "x"),
    ("如何压缩文件", "gzip 可以压缩文件 " * 20),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sound folders that the variants edit."""
    root = tmp_path_factory.mktemp("checkpoints")
    bases = {repr(variant.base): variant.base for variant in RIGHT + WRONG}
    return {key: small_model(root / str(i), **base) for i, (key, base) in enumerate(bases.items())}


@pytest.fixture
def path(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    variant: Variant = request.getfixturevalue("variant")
    folder = Path(shutil.copytree(folders[repr(variant.base)], tmp_path / "model"))
    variant.edit(folder)
    return folder


@pytest.mark.parametrize("variant", RIGHT, ids=lambda variant: variant.name)
def test_it_is_scored_as_the_card_scores_it(variant: Variant, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scorer = Scorer.load(path, device="cpu", precision="float32")
    warnings = [r.getMessage() for r in caplog.records if "self-check" not in r.getMessage()]
    assert len(warnings) == bool(variant.warned), warnings
    assert variant.warned in "".join(warnings)
    card = Card(path)
    for query, document in PAIRS:
        expected = card.logit(query, document, variant.instruction or INSTRUCTION)
        [logit] = scorer.score(scorer.pack([_whole(scorer, query, [document])]))
        assert logit == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("variant", WRONG, ids=lambda variant: variant.name)
def test_it_is_refused_in_one_line(variant: Variant, path: Path) -> None:
    with pytest.raises(ModelLoadError) as caught:
        Scorer.load(path, device="cpu", precision="float32")
    message = str(caught.value)
    assert variant.refused in message
    assert "\n" not in message
    assert len(message) < 600


def _whole(scorer: Scorer, query: str, documents: list[str]) -> Slice:
    request = scorer.encode(RerankRequest(query, documents))
    return Slice(request, 0, len(documents))


def test_the_current_folder_is_not_a_part_of_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path(".") is its own parent, and the module of the weights in modules.json has an empty path."""
    path = small_model(tmp_path / "m")
    sentence_transformers()(path)
    monkeypatch.chdir(path)
    assert len(Scorer.load(".", device="cpu").rerank("a", ["b"])) == 1
