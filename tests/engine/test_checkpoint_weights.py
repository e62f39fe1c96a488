from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from reranker import ModelLoadError, Scorer
from reranker.engine.checkpoint.weights import EMBEDDING, HEAD, Weights
from tests.conftest import make_model
from tests.engine.checkpoints import Edit, nothing, renamed, score_head, tensors


def test_the_tensors_of_all_shards_are_those_of_one_file(tmp_path: Path) -> None:
    whole, shards = Weights(make_model(tmp_path / "a")), Weights(make_model(tmp_path / "b", shards=True))
    assert len(list(shards.path.glob("*.safetensors"))) > 1
    assert whole.stored == shards.stored
    for name, stored in whole.stored.items():
        tensor = whole.tensor(name)
        assert tuple(tensor.shape) == stored.shape
        assert tensor.numel() == stored.numel
        assert torch.equal(tensor, shards.tensor(name))


def test_a_tensor_that_two_shards_hold_is_refused(tmp_path: Path) -> None:
    """Which of the two is meant cannot be known; transformers takes the last one."""
    folder = make_model(tmp_path / "a", layers=1, shards=True)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    twice = next(iter(load_file(first)))
    save_file(load_file(last) | {twice: load_file(first)[twice] * 2}, last)
    with pytest.raises(ModelLoadError, match=re.escape(f"{twice} is in {last} and in {first}: download")) as caught:
        Weights(folder)
    assert "\n" not in str(caught.value)


def test_the_inventory_is_that_of_the_files_which_are_loaded(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", layers=1)
    tensors(folder, lambda f: {name: t.to(torch.bfloat16 if t.ndim == 2 else torch.float32) for name, t in f.items()})
    (folder / "adapter_model.safetensors").write_bytes(b"not read")
    weights = Weights(folder)
    assert weights.stored[EMBEDDING].shape == (8192, 96)
    assert {tensor.dtype for tensor in weights.stored.values()} == {"BF16", "F32"}
    assert {tensor.itemsize for tensor in weights.stored.values()} == {2, 4}
    assert weights.dtype is torch.bfloat16


def test_of_a_tied_pair_the_stored_one_is_read(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", layers=1)
    assert torch.equal(Weights(folder).tensor(HEAD), Weights(folder).tensor(EMBEDDING))
    before = Weights(folder).tensor(EMBEDDING).clone()
    renamed(lambda name: name.replace("model.embed_tokens", "lm_head"))(folder)
    assert torch.equal(Weights(folder).tensor(EMBEDDING), before)
    untied = Weights(make_model(tmp_path / "b", layers=1, tied=False))
    assert not torch.equal(untied.tensor(HEAD), untied.tensor(EMBEDDING))


def test_the_first_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", layers=2)
    tensors(folder, lambda f: f | {"ema.step": torch.ones(1).to(torch.float8_e4m3fn)})  # of no model, and read by none
    assert Weights(folder).not_finite() is None
    for value in (float("nan"), float("inf"), float("-inf")):
        tensors(folder, lambda f, v=value: f | {"model.norm.weight": torch.full((96,), v)})  # type: ignore[misc]
        assert Weights(folder).not_finite() == f"model.norm.weight in {folder / 'model.safetensors'}"


def test_a_file_that_breaks_while_it_is_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    weights = Weights(make_model(tmp_path / "a", layers=1))
    (weights.path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="broken or half downloaded") as caught:
        weights.tensor(EMBEDDING)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_replaced_while_it_is_read_is_an_error_in_one_line(tmp_path: Path) -> None:
    """Of the same shapes: the weights of two trainings would become one model."""
    folder = make_model(tmp_path / "a", layers=2)
    weights = Weights(folder)
    weights.tensor(EMBEDDING)
    file, other = folder / "model.safetensors", tmp_path / "other"
    save_file({name: tensor * 2 for name, tensor in load_file(file).items()}, other, {"format": "pt"})
    os.utime(other, ns=(0, 0))  # as rsync keeps the time of a file
    other.replace(file)
    with pytest.raises(ModelLoadError, match="was replaced while it was read") as caught:
        weights.tensor("model.norm.weight")
    assert "\n" not in str(caught.value)
    assert torch.isfinite(Weights(folder).tensor("model.norm.weight")).all()


def test_a_file_is_mapped_as_long_as_a_tensor_needs_it(tmp_path: Path) -> None:
    folder, maps = make_model(tmp_path / "a", layers=1), Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("this system does not list its mappings")

    def mapped() -> bool:
        return str(folder) in maps.read_text()

    view = Weights(folder).tensor(EMBEDDING)
    assert mapped()
    assert not [file for file in Path("/proc/self/fd").iterdir() if str(folder) in os.path.realpath(file)]
    del view
    assert not mapped()


@pytest.mark.parametrize("edit", [nothing, score_head(torch.randn(1, 96))], ids=["words", "score head"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_file_that_is_overwritten_in_place_does_not_change_a_loaded_model(
    stored: torch.dtype, edit: Edit, tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "a", layers=1)
    edit(folder)
    tensors(folder, lambda found: {name: tensor.to(stored) for name, tensor in found.items()})
    scorer = Scorer.load(folder, device="cpu", precision=str(stored).removeprefix("torch."))
    before, file = scorer.rerank("a", ["b", "c"]), folder / "model.safetensors"
    with file.open("r+b") as opened:
        opened.write(file.stat().st_size * b"\x3c")
    assert scorer.rerank("a", ["b", "c"]) == before
    with file.open("r+b") as opened:
        opened.truncate(0)  # a page that is read from the file now would end the process
    assert scorer.rerank("a", ["b", "c"]) == before
