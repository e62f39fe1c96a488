"""Quantised checkpoints: which formats are read, and that their weights are values times scales."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from reranker import ModelLoadError
from reranker.engine.checkpoint.quantization import read_scheme
from reranker.engine.checkpoint.scales import Layout, scale_per_output, widen
from reranker.engine.checkpoint.weights import Weights
from tests.engine.checkpoints import Tensors, small_model, tensors
from tests.engine.quantization import FORMS, Form, compressed_tensors, fine_grained, fp8, group, plain_twin, quantize

UP = "model.layers.0.mlp.up_proj.weight"
_WEIGHTS: list[tuple[dict[str, Any], str]] = [
    ({"num_bits": 4}, "4 bits of type int"),
    ({"type": "complex"}, "8 bits of type complex"),
    ({"strategy": "tensor_group"}, "strategy tensor_group"),
    ({"strategy": "group", "group_size": 0}, "blocks of [1, 0]"),
    ({"strategy": "block", "block_structure": "16xy"}, "blocks of [16, 0]"),
    ({"actorder": "group"}, "actorder group"),
    ({"dynamic": True}, "dynamic weights"),
    ({"rotation": 5}, "weights with rotation"),
]
"""Settings of weights that are not read."""
INT8, PER_OUTPUT = FORMS[0], {"W8A8", "FP8 dynamic", "FP8 static", "FP8 of vLLM", "a rounded cache"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "base", layers=2, tied=False)


@pytest.fixture(scope="module")
def int8(base: Path) -> Path:
    return quantize(base, base.with_name("int8"), INT8)


def layout(path: Path) -> Layout:
    scheme = read_scheme(path, json.loads((path / "config.json").read_text()))
    assert scheme is not None
    return scheme.layout(path, Weights(path).stored)


def refusal(path: Path, settings: dict[str, Any]) -> str:
    with pytest.raises(ModelLoadError) as caught:
        read_scheme(path, settings)
    return str(caught.value)


def check_weights(path: Path) -> Layout:
    """Every weight is that of the plain twin, bit by bit, and every scale belongs to one of them."""
    found, stored, plain = (
        layout(path),
        load_file(path / "model.safetensors"),
        load_file(plain_twin(path) / "model.safetensors"),
    )
    for name, parts in found.weights.items():
        zero_point = stored[parts.zero_point] if parts.zero_point else None
        assert torch.equal(widen(stored[name], stored[parts.scale], zero_point, parts.block), plain[name])
    used = [name for parts in found.weights.values() for name in parts[:3] if name] + found.unused
    assert len(used) == len(set(used))
    assert sorted(used + [name for name in plain if name not in found.weights]) == sorted(stored)
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_weights_are_values_times_scales(base: Path, tmp_path: Path, form: Form) -> None:
    path = quantize(base, tmp_path / "m", form)
    found, stored = check_weights(path), load_file(path / "model.safetensors")
    assert len(found.unused) == len(found.weights) * len(form.others) + 2 * len(form.cached)
    for name, parts in found.weights.items():
        zero_point = stored[parts.zero_point] if parts.zero_point else None
        scale = scale_per_output(stored[name], stored[parts.scale], zero_point, parts.block)
        if scale is None:
            assert form.name not in PER_OUTPUT
        else:
            whole = load_file(plain_twin(path) / "model.safetensors")[name]
            assert torch.equal(stored[name].float() * scale[:, None], whole)


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_weights_are_those_of_transformers(base: Path, tmp_path: Path, scales: str) -> None:
    found = check_weights(fine_grained(base, tmp_path / "m", scale_fmt=scales))
    assert 0 < len(found.weights) < 14  # no block of 16 rows divides the others


def test_a_zero_point_of_zero_is_no_zero_point() -> None:
    """Older versions of compressed-tensors store it for symmetric weights too."""
    values, scale = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[0.5], [2.0]])
    zero = torch.zeros(2, 1, dtype=torch.int8)
    assert torch.equal(widen(values, scale, zero, (1, 2)), torch.tensor([[0.5, -1], [6, 8]]))
    found = scale_per_output(values, scale, zero, (1, 2))
    assert found is not None
    assert found.tolist() == [0.5, 2.0]
    assert scale_per_output(values, scale, zero + 1, (1, 2)) is None


def test_settings_of_older_versions_are_read(int8: Path) -> None:
    whole = compressed_tensors(group("float", "block", block_structure="16x8", actorder="weight"))
    older = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}, "quantization_config": whole}
    scheme = read_scheme(int8, {"compression_config": older})
    assert scheme is not None
    assert scheme.blocks == {"F8_E4M3": {(16, 8)}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(
            ({"quantization_config": {"quant_method": method}}, f"({method})")
            for method in "gptq awq bitsandbytes torchao modelopt hqq quark auto-round fbgemm_fp8 mxfp4 bitnet".split()
        ),
        ({"quantization_config": {}}, "(unknown method)"),
        ({"quantization_config": {"load_in_8bit": True}}, "(bitsandbytes)"),
        ({"quantization_config": "gptq"}, "(gptq)"),
        ({"compression_config": {"quant_method": "sparseml"}}, "(sparseml)"),
        ({"quantization": {"bits": 8, "group_size": 64}}, "(MLX)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "without config_groups"),
        ({"quantization_config": INT8.config | {"config_groups": [5]}}, "without config_groups"),
        *(
            ({"quantization_config": compressed_tensors(group("int", "group") | {"format": form})}, f", {form})")
            for form in "pack-quantized nvfp4-pack-quantized mxfp4-pack-quantized marlin-24 fakequant dense".split()
        ),
        *(
            ({"quantization_config": compressed_tensors(group("int", "channel", **changes))}, words)
            for changes, words in _WEIGHTS
        ),
        ({"quantization_config": compressed_tensors(group("int", "channel") | {"weights": 5})}, "no object"),
        ({"quantization_config": INT8.config | {"sparsity_config": {"format": "sparse-bitmask"}}}, "sparsity_config"),
        ({"quantization_config": INT8.config | {"transform_config": {"config_groups": {}}}}, "transform_config"),
        ({"quantization_config": fp8(fmt="e5m2")}, "fp8, fmt e5m2"),
        ({"quantization_config": fp8(weight_block_size=[128])}, "fp8, blocks of [128]"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_with_the_way_out(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    message = refusal(tmp_path, settings)
    assert re.search(r"is a quantised checkpoint \(.*\), which is not read: use the original weights", message)
    assert words in message
    assert "MODEL_PRECISION=int8 on a CPU or float8 on a GPU" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
        ("hf_quant_config.json", "NVIDIA ModelOpt"),
        ("quantization_config.json", "torchao"),
    ],
)
def test_other_programs_files_are_refused(tmp_path: Path, file: str, method: str) -> None:
    assert read_scheme(tmp_path, {}) is None
    (tmp_path / file).write_text("{}")
    assert f"({method})" in refusal(tmp_path, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: without(f, f"{UP}_scale"), f"is quantised, and {UP}_scale is missing: download"),
        (lambda f: f | {UP: f[UP].float()}, f"with {UP}_scale)"),
        (lambda f: f | {UP: f[UP].to(torch.float8_e4m3fn)}, "is F8_E4M3, which compressed-tensors, int-quantized does"),
        (lambda f: f | {f"{UP}_scale": f[f"{UP}_scale"][:-1]}, f"{UP}_scale [47, 1] of BF16 for a weight [48, 32]"),
        (lambda f: f | {f"{UP}_scale": f[f"{UP}_scale"].to(torch.int8)}, "of I8"),
        (lambda f: f | {f"{UP}_scale_inv": f[f"{UP}_scale"]}, f"with {UP}_scale_inv)"),
        (lambda f: f | {f"{UP}_g_idx": torch.zeros(32)}, f"with {UP}_g_idx)"),
        (lambda f: f | {f"{UP}_packed": torch.zeros(32)}, f"with {UP}_packed)"),
        (lambda f: f | {f"{UP}_zero_point": torch.zeros(7)}, "has another shape than"),
        (lambda f: f | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight in"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    int8: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    scheme = read_scheme(int8, {"quantization_config": INT8.config})
    assert scheme is not None
    (tmp_path / "model.safetensors").write_bytes((int8 / "model.safetensors").read_bytes())
    tensors(tmp_path, change)
    with pytest.raises(ModelLoadError) as caught:
        scheme.layout(tmp_path, Weights(tmp_path).stored)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def without(stored: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in stored.items() if key != name}


def test_a_zero_point_that_config_json_promises_is_needed(int8: Path) -> None:
    scheme = read_scheme(int8, {"quantization_config": compressed_tensors(group("int", "channel", symmetric=False))})
    assert scheme is not None
    with pytest.raises(ModelLoadError, match="weight_zero_point is missing"):
        scheme.layout(int8, Weights(int8).stored)


def test_settings_without_quantised_weights_are_refused(base: Path) -> None:
    scheme = read_scheme(base, {"quantization_config": INT8.config})
    assert scheme is not None
    with pytest.raises(ModelLoadError, match="no weight is quantised: remove it"):
        scheme.layout(base, Weights(base).stored)
