from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from reranker import ModelLoadError, Scorer
from reranker.engine import device as devices
from reranker.engine import model
from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.device import Memory
from reranker.engine.families import decoder
from reranker.engine.model import Model
from reranker.engine.precision import PRECISIONS
from reranker.errors import ScoringError
from tests.conftest import make_model
from tests.engine.checkpoints import config, tensors


def refused(path: Path | str, **options: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        Scorer.load(path, device="cpu", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_remote_code_beside_a_right_checkpoint_does_not_run(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", layers=1)
    (path / "evil.py").write_text("raise SystemExit('remote code ran')")
    config(path, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    assert "never run" in refused(path)
    config(path, auto_map=None)
    assert len(Scorer.load(path, device="cpu").rerank("a", ["b"])) == 1


def test_the_attention_of_the_config_is_ignored(tmp_path: Path) -> None:
    """It names a package used in training; the engine has its own attention."""
    path = make_model(tmp_path / "m", layers=1)
    scores = Scorer.load(path, device="cpu").rerank("a", ["b", "c"])
    for name in ("attn_implementation", "_attn_implementation"):
        config(path, **{name: "flash_attention_2"})
        assert Scorer.load(path, device="cpu").rerank("a", ["b", "c"]) == scores


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "int8"])
def test_weights_that_do_not_fit_are_an_error_with_sizes(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    gib, weights = 1 << 30, Weights(model_path)
    needed = model.needed_memory(weights, PRECISIONS[precision])

    def memory(device: torch.device, percentage: float) -> Memory:
        return Memory(total=16 * gib, allowed=available + 2 * gib, used=2 * gib)

    monkeypatch.setattr(devices, "memory", memory)
    available = needed - 1
    message = refused(model_path, precision=precision, max_memory_percentage=50)
    assert f"the weights take {needed / gib:.1f} GiB in {precision}, but only 0.0 GiB available of 2.0 GiB" in message
    assert "MAX_MEMORY_PERCENTAGE=50 of 16.0 GiB" in message
    available = needed
    Scorer.load(model_path, device="cpu", precision=precision)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_memory_that_ends_at_load_is_an_error_in_one_line(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError, precision: str
) -> None:
    """Another process may take the memory after it was counted."""
    layers: list[str] = []

    def layer(loader: object, layer: object, name: str) -> None:
        layers.append(name)
        if len(layers) == 2:
            raise error
        load_layer(loader, layer, name)

    load_layer: Any = decoder._Loader.layer
    monkeypatch.setattr(decoder._Loader, "layer", layer)
    message = refused(model_path, precision=precision)
    assert message.startswith("the weights do not fit in the free memory of cpu: free memory")


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_memory_that_ends_at_the_cached_prefix_is_an_error_in_one_line(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, error: RuntimeError
) -> None:
    def cache_prefix(*args: object) -> None:
        raise error

    monkeypatch.setattr(decoder.Decoder, "cache_prefix", cache_prefix)
    message = refused(model_path, precision="float32")
    assert message.startswith("the weights fit, but not the ")
    assert "tokens of the prompt's start beside them" in message


def test_the_allocators_own_error_is_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert devices.out_of_memory(caught.value)
    assert not devices.out_of_memory(RuntimeError("expected m1 and m2 to have the same dtype"))


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_only_weights_that_are_not_finite_are_damaged(tmp_path: Path, precision: str) -> None:
    path = make_model(tmp_path / "m", layers=2)
    tensors(path, lambda found: found | {"model.layers.1.mlp.up_proj.weight": torch.full((160, 96), torch.nan)})
    message = refused(path, precision=precision)
    assert "the weights are damaged: model.layers.1.mlp.up_proj.weight in" in message


@pytest.mark.parametrize(
    "error",
    [
        NotImplementedError("Could not run 'aten::mm' with arguments from the 'Fake' backend"),
        RuntimeError("expected m1 and m2 to have the same dtype, but got: float != c10::BFloat16"),
    ],
)
def test_what_a_machine_cannot_compute_is_named_as_what_it_is(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(model: Model, batch: PackedBatch) -> torch.Tensor:
        raise error

    monkeypatch.setattr(Model, "forward", fail)
    with pytest.raises(ModelLoadError) as caught:
        Scorer.load(model_path, device="cpu", precision="float16")
    message = str(caught.value)
    assert "damaged" not in message
    assert f"float16: warm-up failed: {error}; float32: warm-up failed: {error}" in message
    assert isinstance(caught.value.__cause__, ScoringError)
    assert str(caught.value.__cause__).startswith("float16: ")


def test_a_precision_that_is_not_honoured_is_a_warning(model_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        scorer = Scorer.load(model_path, device="cpu", precision="float8")
    assert scorer.info.precision != "float8"
    assert "float8 is for NVIDIA GPUs only" in caplog.text
