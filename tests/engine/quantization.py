"""Quantised checkpoints as compressed-tensors 0.20.1 and transformers write them, and the same weights in float32."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import Fp8Quantize

from tests.engine.checkpoints import Tensors, config

TYPES = {"int": torch.int8, "float": torch.float8_e4m3fn}
SMALLEST = {torch.int8: -128.0, torch.float8_e4m3fn: -448.0}
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}


@dataclass(frozen=True)
class Form:
    """How weights are rounded, and how config.json says it."""

    name: str
    config: dict[str, Any]
    kinds: dict[str, str]
    """int or float, by a part of the names of the weights."""
    block: tuple[int, int] | None = (1, 0)
    """Rows and columns that share a scale; 0: all; None: one scale of shape [1]."""
    suffix: str = "weight_scale"
    scales: torch.dtype = torch.float32
    asymmetric: bool = False
    others: tuple[str, ...] = ()
    """Scales of activations beside each weight."""
    cached: tuple[str, ...] = ()
    """Scales of the key-value cache in each layer."""


def group(kind: str, strategy: str, /, **changes: Any) -> dict[str, Any]:
    """A group of compressed-tensors for all linear layers."""
    weights = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "dynamic": False} | changes
    activations = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "targets": ["Linear"],
        "weights": {"group_size": None} | weights,
        "input_activations": {"group_size": None} | activations,
        "output_activations": None,
        "format": f"{kind}-quantized",
    }


def compressed_tensors(*groups: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The settings that the library writes into config.json."""
    return {
        "config_groups": {f"group_{i}": group for i, group in enumerate(groups)},
        "format": groups[0]["format"] if len(groups) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.20.1",
    } | changes


def fp8(**changes: Any) -> dict[str, Any]:
    """The settings of fine-grained FP8."""
    return {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]} | changes


ALL = {"int": {"_proj.": "int"}, "float": {"_proj.": "float"}}
_KV = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
_MX = {"group_size": 16, "scale_dtype": "torch.uint8"}
FORMS = [
    Form("W8A8", compressed_tensors(group("int", "channel")), ALL["int"], scales=torch.bfloat16),
    Form("FP8 dynamic", compressed_tensors(group("float", "channel")), ALL["float"], scales=torch.bfloat16),
    Form("FP8 static", compressed_tensors(group("float", "tensor")), ALL["float"], block=None, others=("input_scale",)),
    Form(
        "FP8 in blocks", compressed_tensors(group("float", "block", block_structure=[16, 16])), ALL["float"], (16, 16)
    ),
    Form("int8 in groups", compressed_tensors(group("int", "group", group_size=16)), ALL["int"], (1, 16)),
    Form("MXFP8", compressed_tensors(group("float", "group", **_MX)), ALL["float"], (1, 16), scales=torch.uint8),
    Form(
        "int8 with zero points",
        compressed_tensors(group("int", "channel", symmetric=False)),
        ALL["int"],
        asymmetric=True,
        others=("input_zero_point",),
    ),
    Form(
        "FP8 attention, int8 MLP",
        compressed_tensors(group("float", "channel"), group("int", "channel")),
        {"self_attn": "float", "mlp": "int"},
    ),
    Form("a part is not rounded", compressed_tensors(group("int", "channel")), {"mlp": "int", "q_proj": "int"}),
    Form("head and embedding", compressed_tensors(group("float", "channel"), ignore=[]), {"": "float"}),
    Form(
        "a rounded cache",
        compressed_tensors(group("float", "channel"), kv_cache_scheme=_KV),
        ALL["float"],
        cached=("k_scale", "v_scale"),
    ),
    Form(
        "FP8 of vLLM",
        fp8(weight_block_size=None, activation_scheme="static"),
        ALL["float"],
        None,
        others=("input_scale",),
    ),
    Form(
        "fine-grained FP8, cut off",
        fp8(weight_block_size=[20, 12], fmt="e4m3"),
        ALL["float"],
        (20, 12),
        "weight_scale_inv",
    ),
]


def rounded(weight: Tensor, form: Form, kind: str) -> Tensors:
    """Round a weight: its tensors by the ends of their names."""
    dtype, (rows, columns) = TYPES[kind], weight.shape
    height, width = (rows, columns) if form.block is None else (form.block[0] or rows, form.block[1] or columns)
    padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))  # [R, height, C, width]
    low, high = blocks.amin((1, 3)).clamp_max(0), blocks.amax((1, 3)).clamp_min(0)
    scale = (high - low) / 255 if form.asymmetric else torch.maximum(high, -low) / LARGEST[dtype]
    if form.scales is torch.uint8:
        exponent = (127 + scale.log2().ceil()).to(torch.uint8)
        stored, scale = exponent, torch.exp2(exponent.float() - 127)
    else:
        stored = scale.to(form.scales)
        scale = stored.float()
    zero = (-128 - low / scale).round() if form.asymmetric else torch.zeros_like(scale)
    scaled = blocks / scale[:, None, :, None] + zero[:, None, :, None]
    scaled = scaled.clamp(SMALLEST[dtype], LARGEST[dtype])
    values = (scaled.round() if kind == "int" else scaled).to(dtype).float().flatten(2).flatten(0, 1)
    tensors = {
        "weight": values[:rows, :columns].to(dtype),
        form.suffix: stored.reshape(1) if form.block is None else stored,
    }
    if form.asymmetric:
        tensors["weight_zero_point"] = zero.to(torch.int8)
    return tensors | {name: torch.tensor([0.05]) for name in form.others}


def widened(tensors: Tensors, form: Form) -> Tensor:
    """(values - zero point) x scale in float32, the scale of each weight found by its index."""
    weight, scale = tensors["weight"], tensors[form.suffix]
    height, width = weight.shape if form.block is None else (form.block[0], form.block[1] or weight.shape[1])
    rows, columns = torch.arange(weight.shape[0])[:, None] // height, torch.arange(weight.shape[1])[None] // width
    factor = (torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()).reshape(
        (1, 1) if form.block is None else scale.shape
    )
    zero = tensors["weight_zero_point"].float() if form.asymmetric else torch.zeros_like(factor)
    return (weight.float() - zero[rows, columns]) * factor[rows, columns]


def save(base: Path, folder: Path, stored: Tensors, plain: Tensors, settings: dict[str, Any]) -> Path:
    """Copy `base` to `folder` with quantised tensors and their settings, and to `folder`-plain with others."""
    for path, tensors in ((folder, stored), (plain_twin(folder), plain)):
        shutil.copytree(base, path)
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, path / "model.safetensors", {"format": "pt"})
    config(folder, quantization_config=settings)
    return folder


def plain_twin(folder: Path) -> Path:
    """The folder with the same weights in float32."""
    return folder.with_name(f"{folder.name}-plain")


def quantize(base: Path, folder: Path, form: Form) -> Path:
    """Write `base` with rounded weights into `folder`, and the same weights in float32 into its plain twin."""
    stored = load_file(base / "model.safetensors")
    plain: Tensors = dict(stored)
    for name in list(stored):
        kind = next((kind for part, kind in form.kinds.items() if part in name), None)
        if kind is None or stored[name].dim() != 2:
            continue
        tensors = rounded(stored.pop(name).float(), form, kind)
        plain[name] = widened(tensors, form)
        stored |= {name.removesuffix("weight") + end: tensor for end, tensor in tensors.items()}
    for layer in range(2 if form.cached else 0):
        stored |= {f"model.layers.{layer}.self_attn.{name}": torch.tensor([0.05]) for name in form.cached}
    return save(base, folder, stored, plain, form.config)


def fine_grained(base: Path, folder: Path, **options: Any) -> Path:
    """The same with transformers' own rounding, which leaves weights as they are that no block divides."""
    settings = FineGrainedFP8Config(weight_block_size=(16, 16), **options)
    quantizer: Any = type("Quantizer", (), {"quantization_config": settings})
    stored = load_file(base / "model.safetensors")
    operation: Any = Fp8Quantize(quantizer)
    plain = dict(stored)
    for name in [name for name in stored if "_proj." in name]:
        made = operation.convert({name: stored[name]})
        if len(made) == 2:
            scales = made[f"{name}_scale_inv"].float()
            plain[name] = operation.reverse_op.convert({"weight": made[name], "weight_scale_inv": scales})["weight"]
        stored |= made
    return save(base, folder, stored, plain, settings.to_dict())
