from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from reranker import ModelLoadError, Scorer
from reranker.engine import device as devices
from reranker.engine import model, scorer
from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.adapter import Adapter
from reranker.engine.checkpoint.locate import Located
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.device import Choice, Memory
from reranker.engine.families import decoder, loader, open_checkpoint
from reranker.engine.footprint import COMFORTABLE, Footprint, weight_bytes
from reranker.engine.model import Model, needed_memory
from reranker.engine.precision import PRECISIONS, choose_precisions
from reranker.engine.prompt import Prompt
from reranker.errors import ScoringError
from tests.conftest import make_model
from tests.engine.adapters import factors, write_adapter
from tests.engine.checkpoints import config, tensors

CPU, GIB = torch.device("cpu"), 1 << 30


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


def limit_memory(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    def memory(device: torch.device, percentage: float) -> Memory:
        return Memory(total=16 * GIB, allowed=available + 2 * GIB, used=2 * GIB)

    monkeypatch.setattr(devices, "memory", memory)


def needs(path: Path, precision: str) -> Footprint:
    family = open_checkpoint(Located(path))
    prefix = len(Prompt(family.checkpoint.tokenizer, family.template).static_prefix)
    return needed_memory(family, Weights(path), CPU, PRECISIONS[precision], prefix_tokens=prefix)


@pytest.mark.parametrize("precision", ["bfloat16", "float32", "int8"])
def test_a_model_that_does_not_fit_is_an_error_with_sizes(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    need = needs(model_path, precision)
    limit_memory(monkeypatch, need.needed - 1)
    message = refused(model_path, precision=precision, max_memory_percentage=50)
    assert f"the model needs {need} in {precision}, but only 0.0 GiB available of 2.0 GiB" in message
    assert "MAX_MEMORY_PERCENTAGE=50 of 16.0 GiB" in message
    limit_memory(monkeypatch, need.needed)
    Scorer.load(model_path, device="cpu", precision=precision)


def test_the_error_names_the_precision_that_fits(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def size(weights: Weights, widths: object, precision: torch.dtype, *rest: object) -> Footprint:
        return Footprint(precision.itemsize * GIB, 0, 0, 0)

    monkeypatch.setattr("reranker.engine.model.footprint", size)
    limit_memory(monkeypatch, 2 * GIB)
    assert "MODEL_PRECISION=bfloat16 needs 2.00 GiB; or raise it" in refused(model_path, precision="auto")
    limit_memory(monkeypatch, GIB)
    assert "MODEL_PRECISION=int8 needs 1.00 GiB; or raise it" in refused(model_path, precision="bfloat16")
    limit_memory(monkeypatch, GIB // 2)
    message = refused(model_path, precision="auto")
    assert "and none fits (float32 4.00, bfloat16 2.00, int8 1.00 GiB): raise it, free memory" in message
    assert message.endswith("or use a smaller model; no official one fits")


def test_the_error_names_an_official_model_that_fits(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reranker.engine.model.footprint", lambda *args: Footprint(100 * GIB, 0, 0, 0))
    limit_memory(monkeypatch, 5 * GIB)
    message = refused(model_path, precision="auto")
    assert message.endswith("or use a smaller model, such as Qwen3-Reranker-4B in int8 (4.54 GiB)")


def test_a_gpu_with_little_memory_takes_8_bits(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the whole of `Scorer.load`, a CPU in the place of the GPU: its choice of precisions is replaced."""
    seen: list[bool] = []

    def choose(wanted: str, device: torch.device, stored: object, fits: Any) -> list[Choice[torch.dtype]]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
        seen.extend(map(fits, (torch.bfloat16, torch.int8)))
        return choose_precisions(wanted, torch.device("cuda", 0), fits=lambda dtype: dtype is torch.int8)

    monkeypatch.setattr("reranker.engine.scorer.choose_precisions", choose)
    monkeypatch.setitem(COMFORTABLE, "cpu", 1.0)
    small = 1 + needs(model_path, "int8").needed
    monkeypatch.setattr(devices, "memory", lambda *_: Memory(total=small * 10 // 9, allowed=small, used=0))
    with caplog.at_level(logging.INFO):
        assert Scorer.load(model_path, device="cpu").info.precision == "int8"
    assert "precision: int8 (auto: the model does not fit into the memory in bfloat16, but in int8)" in caplog.text
    assert seen == [needs(model_path, "bfloat16").needed <= needs(model_path, "int8").needed, True]


def test_what_others_hold_of_a_gpu_changes_no_precision(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rolling restart: the old generation holds the memory, and the new one must not score in 8 bits therefore."""
    seen: list[bool] = []

    def choose(wanted: str, device: torch.device, stored: object, fits: Any) -> list[Choice[torch.dtype]]:
        seen.extend(map(fits, (torch.bfloat16, torch.float32)))
        return [Choice(torch.bfloat16, "auto")]

    monkeypatch.setattr("reranker.engine.scorer.choose_precisions", choose)
    need = needs(model_path, "bfloat16")
    limit_memory(monkeypatch, need.needed - 1)
    assert f"the model needs {need} in bfloat16, but only" in refused(model_path, precision="auto")
    assert seen == [True, True]


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_on_the_cpu_and_counted_there(tmp_path: Path, precision: torch.dtype) -> None:
    base = make_model(tmp_path / "m", layers=1)
    adapter = Adapter.read(write_adapter(tmp_path / "a", factors(base)))
    plain, merged = Weights(base), Weights(base, adapter)
    held = weight_bytes(plain, precision, precision)[0]
    gate_up = 2 * plain.stored["model.layers.0.mlp.gate_proj.weight"].numel
    packing = 4 * gate_up if precision is torch.float32 else 0
    assert weight_bytes(plain, precision, precision) == (held, packing)
    assert weight_bytes(merged, precision, precision) == (held, 8 * gate_up)
    assert weight_bytes(merged, precision, precision, on_cpu=False) == (held, 0)


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nand more"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]
LOST = torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device\nand more")
STAGES: dict[str, tuple[Any, str, str]] = {
    "memory": (devices, "memory", "out of memory while the model was loaded"),
    "projections": (loader.Loader, "projection", "the weights do not fit in the free memory of cpu"),
    "second layer": (decoder, "_load", "the weights do not fit in the free memory of cpu"),
    "quantised": (model, "quantize", "the weights do not fit in the free memory of cpu"),
    "prefix": (decoder.Decoder, "cache_prefix", "the weights fit, but not the "),
    "first pass": (Model, "forward", "the weights fit, but no forward pass beside them"),
    "self-check": (scorer, "self_check", "out of memory while the model was loaded"),
}
"""Stage of a load -> what fails in it, and how the error begins."""


def failing(monkeypatch: pytest.MonkeyPatch, stage: str, error: Exception) -> None:
    owner, name, _ = STAGES[stage]
    works, calls = getattr(owner, name), list[int]()

    def fail(*args: object) -> object:
        calls.append(1)
        if stage == "second layer" and len(calls) < 2:
            return works(*args)
        raise error

    monkeypatch.setattr(owner, name, fail)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:20])
@pytest.mark.parametrize("stage", STAGES)
def test_memory_that_ends_at_any_stage_is_an_error_in_one_line(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, error: RuntimeError
) -> None:
    """Another process may take the memory after it was counted."""
    failing(monkeypatch, stage, error)
    message = refused(model_path, precision="int8" if stage == "quantised" else "float32")
    assert message.startswith(STAGES[stage][2])
    assert message.endswith(": raise MAX_MEMORY_PERCENTAGE, free memory, or use a smaller model")


@pytest.mark.parametrize("stage", STAGES)
def test_a_device_that_is_lost_at_any_stage_is_an_error_in_one_line(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """No other precision is tried in a process whose device is lost."""
    loads: list[torch.dtype] = []
    load = model.load

    def counted(family: Any, device: torch.device, dtype: torch.dtype, *limits: Any) -> Model:
        loads.append(dtype)
        return load(family, device, dtype, *limits)

    monkeypatch.setattr("reranker.engine.scorer.load", counted)
    failing(monkeypatch, stage, LOST)
    message = refused(model_path, precision="int8" if stage == "quantised" else "float16")
    assert message.startswith("the device failed while the model was loaded (CUDA error: no kernel image is available")
    assert message.endswith("): check it with nvidia-smi, then start again")
    assert len(loads) == 1


def test_the_last_precision_that_fails_does_not_hide_why_the_first_did(
    model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 on a T4 whose memory float32 does not fit into."""
    family, weights, gib = open_checkpoint(Located(model_path)), Weights(model_path), 1 << 30
    needed = model.needed_memory(family, weights, torch.device("cpu"), torch.float16, prefix_tokens=512).needed
    monkeypatch.setattr(devices, "memory", lambda *_: Memory(total=16 * gib, allowed=needed, used=0))
    monkeypatch.setattr(Model, "forward", lambda model, batch: torch.full((batch.shape.documents,), torch.nan))
    message = refused(model_path, precision="float16")
    assert re.match(r"float16: a warm-up score is not a number; float32: the model needs .* in float32", message)


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
