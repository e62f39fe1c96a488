"""Linear layers with 8-bit weights and activations: int8 on the CPU, float8 on NVIDIA's Ada, Hopper and newer.

Weights have a scale for each output, made once at load; activations one for each token, made anew in every pass, so
that a document's score does not depend on its neighbours. Everything between the products keeps its precision.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reranker.engine.precision import FLOAT8

# Largest error of a product, as a share of its norm, that rounding to 8 bits explains: 2 % for int8 and 4 % for float8
# on normally distributed numbers; a kernel that is wrong, or whose sums overflow, is far beyond.
_TOLERANCE = 0.08
_TINY = 1e-20


class Int8Linear(nn.Module):
    """int8 weights, int8 (without VNNI 7-bit) activations, sums in int32, result in float32; FBGEMM's kernel.

    Without VNNI the processor adds pairs of products in 16 bits, which overflow with 8-bit activations.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(1).clamp_min(_TINY) / 127
        integers = torch.round(weight / scale[:, None]).to(torch.int8)
        zeros = torch.zeros(len(scale), dtype=torch.int64)
        with warnings.catch_warnings():
            # Only these kernels are fast without VNNI, and they are packed from such tensors. torch is pinned; where
            # a later one has them no more, the start falls back to float32 and says so.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            quantized = torch._make_per_channel_quantized_tensor(integers, scale.double(), zeros, 0)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if linear.bias is None else linear.bias.detach().float()
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out], float32"""
        # Tokens of equal size first, for the kernel has one scale for all of them.
        size = x.abs().amax(-1, keepdim=True).clamp_min_(_TINY)
        out: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / size, 1 / self.levels, self.levels + 1, self.packed
        ).mul_(size)
        return out if self.bias is None else out.add_(self.bias)


class Float8Linear(nn.Module):
    """float8 (e4m3) weights and activations, [T, in] bfloat16 -> [T, out] bfloat16; torch's `_scaled_mm`."""

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = _float8(linear.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.t().contiguous())
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
            use_fast_accum=x.is_cuda,  # as vLLM and torchao do; without it Hopper loses much of the gain
        )
        return out if self.bias is None else out + self.bias


def quantize(linear: nn.Linear, precision: torch.dtype) -> nn.Module:
    """An int8 or float8 stand-in of a projection, proved against the projection itself on the device.

    Raises:
        RuntimeError: this machine has no such product, or computes it wrongly.
    """
    made = Int8Linear(linear) if precision is torch.int8 else Float8Linear(linear)
    if (error := difference(made, linear)) > _TOLERANCE:
        raise RuntimeError(f"a product is off by {error:.0%} of its size on this machine")
    return made


@torch.inference_mode()
def difference(made: nn.Module, linear: nn.Linear) -> float:
    """Error of the quantised product as a share of the true one's norm, on normally distributed inputs."""
    weight = linear.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, weight.shape[1], generator=generator).bfloat16().to(weight.device)
    true = F.linear(x.float(), weight.float(), None if linear.bias is None else linear.bias.float())
    got = made(x if isinstance(made, Float8Linear) else x.float()).float()  # as the layers give it, however stored
    error = ((got - true).norm() / true.norm().clamp_min(_TINY)).item()
    return error if error == error else float("inf")


def _float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, in] -> float8 [rows, in] and its scales [rows, 1] float32"""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(_TINY) / torch.finfo(FLOAT8).max
    return (x.float() / scale).to(FLOAT8), scale
