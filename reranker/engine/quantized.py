"""Linear layers with 8-bit weights and activations: int8 on a CPU and on NVIDIA GPUs, float8 on Ada, Hopper and newer.

Weights have a scale per output, computed at load, or taken with the values from a quantised checkpoint. Activations
have a scale per token, computed in every pass, so that a document's score does not depend on the rest of its batch.
Everything between the products keeps its precision.
"""

from __future__ import annotations

import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reranker.engine.checkpoint.scales import Rounded
from reranker.engine.precision import FLOAT8

_TOLERANCE = 0.08
"""Of a product, as a share of its norm. Rounding to 8 bits explains 2 % for int8 and 4 % for float8 on normally
distributed numbers; the error of a wrong kernel, or of sums that overflow, is far larger."""
_MIN_SCALE = 1e-20
_MIN_ROWS = 32
"""Of the activations in cuBLAS's int8 product, which needs more than 16 and multiples of 8 as inputs and outputs
(aten/src/ATen/native/cuda/Blas.cpp, `_int_mm_out_cuda`); fewer are padded to those of the product proved at load."""


class Int8Linear(nn.Module):
    """int8 weights and activations, sums in int32, results in float32; FBGEMM's kernel.

    Activations have 7 bits without VNNI: the processor then adds pairs of products in 16 bits, which 8-bit activations
    overflow.

    Args:
        linear: the weights and the bias.
        stored: the weights as a checkpoint rounded them; None: they are rounded here.
    """

    def __init__(self, linear: nn.Linear, stored: Rounded | None = None) -> None:
        super().__init__()
        values, scale = stored or _int8(linear.weight.detach())
        scale = scale.flatten()
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            # torch deprecates these tensors, but only their kernels are fast without VNNI. torch is pinned; with a
            # version that lacks them, loading logs that it falls back to float32.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32"""
        # The kernel has one scale for all tokens, so each token is scaled to a maximum of 1 before.
        size = x.abs().amax(-1, keepdim=True).clamp_min_(_MIN_SCALE)
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / size, 1 / self.levels, self.levels + 1, self.packed
        ).mul_(size)
        return out if self.bias is None else out.add_(self.bias)


class Int8GpuLinear(nn.Module):
    """int8 weights and activations on an NVIDIA GPU, [T, in] -> [T, out] in the type of the input; torch's `_int_mm`.

    Sums are exact in int32 for up to 133,000 inputs; scales and bias are applied in float32.

    Args:
        linear: see Int8Linear.
        stored: see Int8Linear.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, stored: Rounded | None = None) -> None:
        super().__init__()
        values, scale = stored or _int8(linear.weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale.reshape(1, -1).contiguous())
        self.bias = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        activations, scale = _int8(x)
        out = _int8_product(activations, self.weight).float().mul_(scale).mul_(self.scale)
        return (out if self.bias is None else out.add_(self.bias)).to(x.dtype)


class Float8Linear(nn.Module):
    """float8 (e4m3) weights and activations, [T, in] bfloat16 -> [T, out] bfloat16; torch's `_scaled_mm`.

    Args:
        linear: see Int8Linear.
        stored: see Int8Linear.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, stored: Rounded | None = None) -> None:
        super().__init__()
        values, scale = stored or _float8(linear.weight.detach())
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale.reshape(1, -1).contiguous())
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        activations, scale = _float8(x)
        out = torch._scaled_mm(
            activations,
            self.weight.t(),
            scale_a=scale,
            scale_b=self.scale,
            out_dtype=x.dtype,
            use_fast_accum=x.is_cuda,  # as in vLLM and torchao; without it Hopper loses much of the gain
        )
        return out if self.bias is None else out + self.bias


def quantize(linear: nn.Linear, precision: torch.dtype, stored: Rounded | None = None) -> nn.Module:
    """Replace a projection by an int8 or float8 one, after comparing their results on the device.

    Args:
        linear: the projection; of `stored`, the values times the scales.
        precision: int8 or float8.
        stored: its weights in this precision, taken as they are.

    Raises:
        RuntimeError: this machine has no such product, or computes it wrongly.
    """
    quantized: nn.Module
    if precision is FLOAT8:
        quantized = Float8Linear(linear, stored)
    else:
        quantized = (Int8Linear if linear.weight.device.type == "cpu" else Int8GpuLinear)(linear, stored)
    if (error := difference(quantized, linear)) > _TOLERANCE:
        raise RuntimeError(f"a product is off by {error:.0%} of its size on this machine")
    return quantized


@torch.inference_mode()
def difference(quantized: nn.Module, linear: nn.Linear) -> float:
    """Return the error of quantised products as a share of the exact ones' norm, on normally distributed inputs."""
    weight = linear.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_MIN_ROWS, weight.shape[1], generator=generator).bfloat16().to(weight.device)
    exact = F.linear(x.float(), weight.float(), None if linear.bias is None else linear.bias.float())
    inputs = x.float() if isinstance(quantized, Int8Linear) else x  # in the type of the layers, not of the weights
    error = ((quantized(inputs).float() - exact).norm() / exact.norm().clamp_min(_MIN_SCALE)).item()
    return float("inf") if math.isnan(error) else error


def _int8_product(x: Tensor, weight: Tensor) -> Tensor:
    """[T, in] int8, [out, in] int8 -> [T, out] int32"""
    return (_compiled_product if torch.compiler.is_compiling() else _product)(x, weight)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.shape[0]
    if rows < _MIN_ROWS:
        x = F.pad(x, (0, 0, 0, _MIN_ROWS - rows))
    return torch._int_mm(x, weight.t())[:rows]


@torch.library.custom_op("reranker::int8_product", mutates_args=())
def _compiled_product(x: Tensor, weight: Tensor) -> Tensor:
    """An operator that the compiler calls as it is; of `_int_mm` it would compile and time a dozen kernels a shape."""
    return _product(x, weight)


@_compiled_product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.int32)


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, in] -> int8 [rows, in] and scales [rows, 1] float32"""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min_(_MIN_SCALE) / 127
    return (x / scale).round_().to(torch.int8), scale


def _float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, in] -> float8 [rows, in] and scales [rows, 1] float32"""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(_MIN_SCALE) / torch.finfo(FLOAT8).max
    return (x.float() / scale).to(FLOAT8), scale
