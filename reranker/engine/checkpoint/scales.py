"""Find the scales of quantised weights, multiply values by them, or join both as they are stored.

The weights that are quantised are those that the files store as int8 or float8 (e4m3), each with its scale beside it;
config.json gives the size of a block of weights that share a scale. Its lists of layers (targets, ignore,
modules_to_not_convert) say the same as the files and are not needed. Scales of activations and of key-value caches are
not needed either: activations are not rounded, or rounded with a scale per token.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from reranker.engine.checkpoint.files import AGAIN, UNQUANTIZED, refuse_if
from reranker.engine.checkpoint.tensors import Stored
from reranker.errors import ModelLoadError

VALUES = {"I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}
"""Types of quantised weights in safetensors' notation."""
_SCALES = ("F64", "F32", "F16", "BF16", "U8", "F8_E8M0")
"""Types of scales; the last two hold the exponent of a power of two."""
_IN_LAYER = re.compile(r"(^|\.)layers?\.\d+\.")
"""Projections, in contrast to heads and embeddings."""
_UNUSED = re.compile(r"\.(input|output|activation|q|k|v|kv)_(scale|zero_point)$")
_OTHER = re.compile(
    r"\.(weight_(packed|shape|scale|scale_inv|zero_point|global_scale|g_idx)|(input|output)_global_scale)$"
)

Read = Callable[[str], Tensor]
"""Returns a tensor of the files by its name."""
Block = tuple[int, int]
"""Rows and columns of a weight that share a scale."""


class Parts(NamedTuple):
    """One quantised weight: the names of its tensors, and its blocks."""

    values: str
    scale: str
    zero_point: str | None
    block: Block
    dtype: torch.dtype
    per_output: bool
    """Whether the outputs have one scale each, as far as the headers tell."""

    def tensors(self, read: Read) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, scale and zero point."""
        return read(self.values), read(self.scale), read(self.zero_point) if self.zero_point else None


class Rounded(NamedTuple):
    """A weight of 8 bits with a scale per output."""

    values: Tensor
    """[out, in] int8 or float8"""
    scale: Tensor
    """[out] float32"""

    def to(self, device: torch.device) -> Rounded:
        """Copy it to a device."""
        return Rounded(self.values.to(device), self.scale.to(device))


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

    @property
    def precision(self) -> torch.dtype | None:
        """int8 or float8, if all quantised projections can be multiplied as they are stored; None otherwise."""
        projections = [parts for name, parts in self.weights.items() if _IN_LAYER.search(name)]
        dtypes = {parts.dtype for parts in projections if parts.per_output}
        return dtypes.pop() if len(dtypes) == 1 and all(parts.per_output for parts in projections) else None

    def widened(self, stored: Mapping[str, Stored]) -> dict[str, Stored]:
        """Return the tensors of the model as they are after widening, without the scales."""
        consumed = self.consumed
        return {
            name: tensor._replace(dtype="F32") if name in self.weights else tensor
            for name, tensor in stored.items()
            if name not in consumed
        }

    def widen(self, name: str, read: Read) -> Tensor:
        """[out, in] float32: (values - zero point) * scale, computed in float32."""
        return widen(*self.weights[name].tensors(read), self.weights[name].block)

    def rounded(self, names: Sequence[str], read: Read) -> Rounded | None:
        """Return weights of the same input as they are stored, one below the other, where `precision` is not None.

        None if one of them is not quantised, or has a zero point other than 0.
        """
        values: list[Tensor] = []
        scales: list[Tensor] = []
        for name in names:
            if name not in self.weights:
                return None
            tensors = self.weights[name].tensors(read)
            if (scale := scale_per_output(*tensors, self.weights[name].block)) is None:
                return None
            values.append(tensors[0])
            scales.append(scale)
        return Rounded(torch.cat(values), torch.cat(scales))


@dataclass(frozen=True)
class Scheme:
    """A format that is read."""

    name: str
    """For messages: `compressed-tensors, int-quantized`."""
    blocks: Mapping[str, frozenset[Block]]
    """The types of values in the files, each with the blocks that config.json gives."""
    asymmetric: frozenset[str] = frozenset()
    """Types of values that need a zero point."""

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
        consumed = layout.consumed
        other = next((name for name in stored if _OTHER.search(name) and name not in consumed), None)
        if other:
            raise not_read(path, f"{self.name} with {other}")
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
            raise not_read(path, f"{self.name} with {found} for a weight {list(values.shape)}")
        zero_point = f"{name}_zero_point"
        if zero_point not in stored:
            missing = values.dtype in self.asymmetric
            refuse_if(missing, f"{where} is quantised, and {zero_point} is missing: {AGAIN}")
            return Parts(name, scale, None, block, VALUES[values.dtype], block[1] >= values.shape[1])
        other = math.prod(stored[zero_point].shape) != math.prod(stored[scale].shape)
        refuse_if(other, f"{zero_point} in {path} has another shape than {scale}: {AGAIN}")
        symmetric = block[1] >= values.shape[1] and values.dtype not in self.asymmetric
        return Parts(name, scale, zero_point, block, VALUES[values.dtype], symmetric)

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


def not_read(path: Path, method: str) -> ModelLoadError:
    """Return the refusal of a quantised checkpoint."""
    return ModelLoadError(f"{path} is a quantised checkpoint ({method[:200]}), which is not read: {UNQUANTIZED}")
