from __future__ import annotations

from pathlib import Path

import torch

from reranker.engine.checkpoint.weights import inventory, not_finite, parameters
from tests.conftest import make_model
from tests.engine.checkpoints import tensors


def test_parameters_are_counted_from_all_shards(tmp_path: Path) -> None:
    whole, shards = make_model(tmp_path / "a"), make_model(tmp_path / "b", shards=True)
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert parameters(whole) == parameters(shards) > 100_000


def test_the_inventory_is_that_of_the_files_which_are_loaded(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", layers=1)
    tensors(folder, lambda f: {name: tensor.bfloat16() for name, tensor in f.items()})
    (folder / "adapter_model.safetensors").write_bytes(b"not read")
    stored = inventory(folder)
    assert stored["model.embed_tokens.weight"].shape == (8192, 96)
    assert {tensor.dtype for tensor in stored.values()} == {"BF16"}


def test_the_first_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "a", layers=2)
    assert not_finite(folder) is None
    for value in (float("nan"), float("inf"), float("-inf")):
        tensors(folder, lambda f, v=value: f | {"model.norm.weight": torch.full((96,), v)})  # type: ignore[misc]
        assert not_finite(folder) == f"model.norm.weight in {folder / 'model.safetensors'}"
