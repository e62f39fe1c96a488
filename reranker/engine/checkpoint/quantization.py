"""Read quantised checkpoints whose weights are 8-bit values times scales: compressed-tensors, and FP8 of transformers.

The weights that are quantised are those that the files store as int8 or float8 (e4m3), each with its scale beside it;
config.json gives the format and the size of a block of weights that share a scale. Its lists of layers (targets,
ignore, modules_to_not_convert) say the same as the files and are not needed. Scales of activations and of key-value
caches are not needed either: activations are not rounded, or rounded with a scale per token.

Source of the formats: compressed-tensors 0.20 (naive_quantized and mxfp8 compressors), transformers'
integrations/finegrained_fp8.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reranker.engine.checkpoint.files import AGAIN, UNQUANTIZED, refuse_if
from reranker.engine.checkpoint.weights import Stored
from reranker.errors import ModelLoadError

_METHOD_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantization_config.json": "torchao",
}
VALUES = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
"""Types of quantised weights in safetensors' notation."""
_SCALES = ("F64", "F32", "F16", "BF16", "U8", "F8_E8M0")
"""Types of scales; the last two hold the exponent of a power of two."""
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized", "mixed-precision")
_WEIGHT_FIELDS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip
_UNUSED = re.compile(r"\.(input|output|activation|q|k|v|kv)_(scale|zero_point)$")
_OTHER = re.compile(
    r"\.(weight_(packed|shape|scale|scale_inv|zero_point|global_scale|g_idx)|(input|output)_global_scale)$"
)

Block = tuple[int, int]
"""Rows and columns of a weight that share a scale."""


class _NotReadError(Exception):
    """Names the part of a format that is not read."""


class Parts(NamedTuple):
    """One quantised weight: the names of its tensors, and its blocks."""

    values: str
    scale: str
    zero_point: str | None
    block: Block


class Rounded(NamedTuple):
    """A weight of 8 bits with a scale per output."""

    values: Tensor
    """[out, in] int8 or float8"""
    scale: Tensor
    """[out] float32"""


class Layout(NamedTuple):
    """The quantised weights of a checkpoint."""

    weights: dict[str, Parts]
    """By the name of the weight, which is also that of its values."""
    unused: list[str]
    """Scales of activations and caches."""

    @property
    def consumed(self) -> set[str]:
        """The names of all scales and zero points."""
        return {name for parts in self.weights.values() for name in parts[1:3] if name} | set(self.unused)


@dataclass(frozen=True)
class Scheme:
    """A format that is read."""

    name: str
    """For messages: `compressed-tensors, int-quantized`."""
    blocks: Mapping[str, frozenset[Block]]
    """The types of values in the files, each with the blocks that config.json gives."""
    asymmetric: frozenset[str] = frozenset()
    """Types of values that need a zero point."""

    @staticmethod
    def of(path: Path, settings: Mapping[str, Any]) -> Scheme | None:
        """Return the format that config.json describes; None if the weights are not quantised.

        Raises:
            ModelLoadError: the format is not read.
        """
        stored = settings.get("quantization_config", settings.get("compression_config"))
        if not isinstance(stored, dict):
            by_file = (method for name, method in _METHOD_FILES.items() if (path / name).exists())
            method = str(stored) if stored is not None else "MLX" if settings.get("quantization") else next(by_file, "")
            if method:
                raise _not_read(path, method)
            return None
        bitsandbytes = any(str(key).startswith("load_in_") for key in stored)
        method = str(stored.get("quant_method") or ("bitsandbytes" if bitsandbytes else "unknown method"))
        read = {"compressed-tensors": _compressed_tensors, "fp8": _fp8}.get(method)
        try:
            if read is not None:
                return read(stored)
        except _NotReadError as error:
            method = f"{method}, {error}"
        raise _not_read(path, method)

    def layout(self, path: Path, stored: Mapping[str, Stored]) -> Layout:
        """Find the tensors of every quantised weight; each scale belongs to exactly one.

        Raises:
            ModelLoadError: a tensor is missing, has another shape or type, or belongs to no quantised weight.
        """
        weights: dict[str, Parts] = {}
        for name, tensor in stored.items():
            if name.endswith(".weight") and tensor.dtype in VALUES:
                weights[name] = self._parts(path, name, stored)
        layout = Layout(weights, [name for name in stored if _UNUSED.search(name)])
        other = next((name for name in stored if _OTHER.search(name) and name not in layout.consumed), None)
        if other:
            raise _not_read(path, f"{self.name} with {other}")
        no_weight = f"{path / 'config.json'} has a quantization_config ({self.name}), but no weight is quantised"
        refuse_if(not weights, f"{no_weight}: remove it if the weights were widened")
        return layout

    def _parts(self, path: Path, name: str, stored: Mapping[str, Stored]) -> Parts:
        values, where = stored[name], f"{name} in {path}"
        described = values.dtype in self.blocks and len(values.shape) == 2
        refuse_if(not described, f"{where} is {values.dtype}, which {self.name} does not describe: {UNQUANTIZED}")
        scale = f"{name}_scale" if f"{name}_scale" in stored else f"{name}_scale_inv"
        refuse_if(scale not in stored, f"{where} is quantised, and {name}_scale is missing: {AGAIN}")
        block = self._block(values, stored[scale].shape)
        if block is None or stored[scale].dtype not in _SCALES:
            found = f"{scale} {list(stored[scale].shape)} of {stored[scale].dtype}"
            raise _not_read(path, f"{self.name} with {found} for a weight {list(values.shape)}")
        zero_point = f"{name}_zero_point"
        if zero_point not in stored:
            missing = values.dtype in self.asymmetric
            refuse_if(missing, f"{where} is quantised, and {zero_point} is missing: {AGAIN}")
            return Parts(name, scale, None, block)
        other = math.prod(stored[zero_point].shape) != math.prod(stored[scale].shape)
        refuse_if(other, f"{zero_point} in {path} has another shape than {scale}: {AGAIN}")
        return Parts(name, scale, zero_point, block)

    def _block(self, values: Stored, scale: tuple[int, ...]) -> Block | None:
        """Return the block by the shape of the scale; None if no block, or more than one, has that shape."""
        rows, columns = values.shape
        if math.prod(scale) == 1:
            return rows, columns
        if scale in ((rows,), (rows, 1)):
            return 1, columns
        blocks = self.blocks[values.dtype]
        fitting = [b for b in blocks if scale == (math.ceil(rows / b[0]), math.ceil(columns / b[1]))]
        return fitting[0] if len(fitting) == 1 else None


def widen(values: Tensor, scale: Tensor, zero_point: Tensor | None, block: Block) -> Tensor:
    """[out, in] int8 or float8 -> [out, in] float32: (values - zero_point) * scale, computed in float32."""
    weight = values.float()
    if zero_point is not None:
        weight -= _expand(zero_point.float(), values.shape, block)
    return weight.mul_(_expand(_floats(scale), values.shape, block))


def scale_per_output(values: Tensor, scale: Tensor, zero_point: Tensor | None, block: Block) -> Tensor | None:
    """Return the scale as [out] float32; None if a row has several scales, or a zero point other than 0."""
    if block[1] < values.shape[1] or (zero_point is not None and zero_point.float().any()):
        return None
    return _expand(_floats(scale), values.shape, block)[:, 0].expand(values.shape[0]).contiguous()


def _floats(scale: Tensor) -> Tensor:
    return torch.exp2(scale.float() - 127) if scale.dtype is torch.uint8 else scale.float()


def _expand(scale: Tensor, shape: torch.Size, block: Block) -> Tensor:
    """Repeat scales over their blocks, of which the last may be cut off; a dimension of size 1 broadcasts."""
    scale = scale.reshape(math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1]))
    for dim in (0, 1):
        if scale.shape[dim] > 1:
            scale = scale.repeat_interleave(block[dim], dim).narrow(dim, 0, shape[dim])
    return scale


def _not_read(path: Path, method: str) -> ModelLoadError:
    return ModelLoadError(f"{path} is a quantised checkpoint ({method[:200]}), which is not read: {UNQUANTIZED}")


def _compressed_tensors(stored: Mapping[str, Any]) -> Scheme:
    """Read the settings that compressed-tensors writes; older ones are nested once more."""
    nested = stored.get("quantization_config")
    config = nested if isinstance(nested, dict) else stored
    sparsity, groups = stored.get("sparsity_config") or {}, config.get("config_groups")
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise _NotReadError("sparsity_config")
    if stored.get("transform_config"):
        raise _NotReadError("transform_config")
    form = str(config.get("format"))[:40]
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _NotReadError("without config_groups")
    blocks: dict[str, set[Block]] = {}
    asymmetric: set[str] = set()
    for group in groups.values():
        if (own := str(group.get("format") or form)[:40]) not in _FORMATS:
            raise _NotReadError(own)
        if (weights := group.get("weights")) is None:
            continue
        values = _values(weights)
        blocks.setdefault(values, set()).update(_blocks(weights))
        if not weights.get("symmetric", True):
            asymmetric.add(values)
    found = {values: frozenset(sizes) for values, sizes in blocks.items()}
    return Scheme(f"compressed-tensors, {form}", found, frozenset(asymmetric))


def _values(weights: Any) -> str:
    """Return the type of the values of a group in the files."""
    if not isinstance(weights, dict):
        raise _NotReadError("weights that are no object")
    if unknown := set(weights) - _WEIGHT_FIELDS:
        raise _NotReadError(f"weights with {min(unknown)[:40]}")
    kind, bits = str(weights.get("type", "int")).lower(), weights.get("num_bits", 8)
    values = {"int": "I8", "float": "F8_E4M3"}.get(kind)
    if bits != 8 or values is None:
        raise _NotReadError(f"{str(bits)[:10]} bits of type {kind[:10]}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _NotReadError(f"actorder {str(weights['actorder'])[:20]}")
    if weights.get("dynamic"):
        raise _NotReadError("dynamic weights")
    return values


def _blocks(weights: Mapping[str, Any]) -> list[Block]:
    """Return the blocks of a group of compressed-tensors; none for a scale per tensor or per output."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("group" if size and size != -1 else "channel" if size else "tensor")
    if isinstance(structure, str):  # as older versions write it
        structure = [int(part) if part.isdecimal() else 0 for part in structure.split("x")]
    if strategy in ("tensor", "channel"):
        return []
    if strategy == "group":
        return [_block([1, size])]
    if strategy == "block":
        return [_block(structure)]
    raise _NotReadError(f"strategy {str(strategy)[:20]}")


def _block(sizes: Any) -> Block:
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    raise _NotReadError(f"blocks of {str(sizes)[:40]}")


def _fp8(stored: Mapping[str, Any]) -> Scheme:
    """Read the settings of FP8 as transformers and vLLM write it: blocks, or one scale a weight without blocks."""
    if str(stored.get("fmt", "e4m3")) not in ("e4m3", "e4m3fn"):
        raise _NotReadError(f"fmt {str(stored['fmt'])[:20]}")
    sizes = stored.get("weight_block_size")
    return Scheme("fp8", {"F8_E4M3": frozenset([] if sizes is None else [_block(sizes)])})
