"""Products on a CPU: torch's own, or oneDNN's with the weights in its layout, whichever is faster at load.

torch multiplies float32 by MKL, which leaves part of some processors' vector units unused. oneDNN's rows do not depend
on the other rows of a product; float32 sums differ from MKL's by rounding alone. Both are private operators of torch
that its compiler calls: where they are missing or wrong, torch's own product stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reranker.engine.checkpoint.files import first_line

logger = logging.getLogger(__name__)

BLOCK_ROWS = 512
"""Tokens that a layer's half computes at a time: their activations stay in the caches of a core."""
_FEW_ROWS, _ROW_STEPS = 128, (16, 32)
"""Rows are padded to a multiple of the first step up to _FEW_ROWS, of the second above. oneDNN generates and caches
code for every shape and number of threads (about 1 MB and 1 ms each, 28 numbers of rows for each matrix), and the
number of tokens differs in every pass."""
_WIDENED_BYTES = 2 << 20
"""Of a matrix that is widened at a time: it is multiplied before it leaves the caches, whatever a matrix's size."""
_TOLERANCE = 1e-5
"""Of a product, as a share of its norm. Another order of the sums explains 1e-6 with 10,000 inputs."""
_MIN_GAIN = 1.03
MIN_WEIGHTS = 4 << 20
"""Of all projections. Of a smaller model the gain is small and noisy, and workers must not choose differently."""
_COMPARED_ROWS, _COMPARED_WEIGHTS = (16, 256), 2 << 20


class CpuLinear(nn.Module):
    """A projection on a CPU, [T, in] -> [T, out] in the type of its weights.

    torch's own product of bfloat16 is oneDNN's already, so that its rows are padded too.

    Args:
        linear: the weights and the bias, in float32 or bfloat16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor | None = linear.weight
        self.bias = linear.bias
        self.packed: Tensor | None = None

    def pack(self) -> None:
        """Replace the weights by oneDNN's layout of them."""
        assert self.weight is not None
        self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), BLOCK_ROWS)
        self.weight = None

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        if self.packed is None:
            assert self.weight is not None
            product = partial(F.linear, weight=self.weight, bias=self.bias)
            return _padded(product, x) if self.weight.dtype is torch.bfloat16 else product(x)
        return _padded(lambda rows: _onednn(rows, self.packed, self.bias), x)


class WideningLinear(nn.Module):
    """A projection that keeps 16-bit weights and multiplies them in float32, [T, in] float32 -> [T, out] float32.

    A part of the matrix is widened, which is exact, and multiplied, then the next one: the products are those of
    float32 weights to the last bit, by the same kernel.

    Args:
        linear: the weights and the bias as they are stored, in bfloat16 or float16.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach().float(), requires_grad=False)
        self.outputs = max(64, _WIDENED_BYTES // (4 * linear.in_features) // 64 * 64)
        self.product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear

    def pack(self) -> None:
        """Multiply by oneDNN's kernel; the weights stay as they are."""
        self.product = _onednn

    def forward(self, x: Tensor) -> Tensor:
        """[T, in] -> [T, out]"""
        return self._widened(x) if self.product is F.linear else _padded(self._widened, x)

    def _widened(self, x: Tensor) -> Tensor:
        out = x.new_empty(len(x), len(self.weight))
        for start in range(0, len(self.weight), self.outputs):
            part = slice(start, start + self.outputs)
            out[:, part] = self.product(x, self.weight[part].float(), None if self.bias is None else self.bias[part])
        return out


def row_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split tensors [T, ...] into blocks of BLOCK_ROWS rows on a CPU; the last block has half as many to 1.5 times."""
    whole = tensors[0].device.type != "cpu" or torch.compiler.is_compiling()
    count = 1 if whole else max(1, (2 * len(tensors[0]) + BLOCK_ROWS) // (2 * BLOCK_ROWS))
    sizes = [BLOCK_ROWS] * (count - 1) + [len(tensors[0]) - BLOCK_ROWS * (count - 1)]
    return zip(*(tensor.split(sizes) for tensor in tensors), strict=True)


def in_blocks(work: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Return `work(*tensors)`, [T, ...], computed block by block of their rows."""
    return cat(*(work(*block) for block in row_blocks(*tensors)))


def cat(*parts: Tensor) -> Tensor:
    """Join parts, [rows, ...] each; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _padded(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Compute [T, in] -> [T, out] in blocks whose rows are padded to a multiple of a row step."""

    def padded(block: Tensor) -> Tensor:
        missing = -len(block) % _ROW_STEPS[len(block) > _FEW_ROWS]
        return product(F.pad(block, (0, 0, 0, missing)))[: len(block)] if missing else product(block)

    return in_blocks(padded, x)


def choose_product(linears: Sequence[CpuLinear | WideningLinear]) -> None:
    """Compare both float32 products at every width, let all linears use the faster one, and log the reason.

    One thread computes, as in a lane, and few and many rows count as they take time; it takes well under a second.
    """
    if sum(linear.weight.numel() for linear in linears if linear.weight is not None) < MIN_WEIGHTS:
        logger.info("products: torch's own (the model is small)")
        return
    start = time.thread_time()
    shapes = {
        (tuple(linear.weight.shape), linear.bias is None): linear for linear in linears if linear.weight is not None
    }
    try:
        with _one_thread(), torch.inference_mode():
            compared = [_compare(linear) for linear in shapes.values()]
    except (RuntimeError, AttributeError, NotImplementedError, TypeError) as error:
        logger.info("products: torch's own (oneDNN: %s)", first_line(error))
        return
    gain = sum(seconds for seconds, _ in compared) / sum(seconds for _, seconds in compared)
    used = gain >= _MIN_GAIN
    why = f"{gain:.2f} times as fast on one thread, compared in {time.thread_time() - start:.1f} s"
    if used:
        for linear in linears:
            linear.pack()
    logger.info("products: %s (oneDNN is %s)", "oneDNN's" if used else "torch's own", why)


def _compare(linear: CpuLinear | WideningLinear) -> tuple[float, float]:
    """Return the seconds of both products, oneDNN's second, on a part of the outputs.

    Raises:
        RuntimeError: they differ, or one is not implemented.
    """
    assert linear.weight is not None
    outputs = max(64, _COMPARED_WEIGHTS // linear.weight.shape[1])
    weight, bias = linear.weight.detach()[:outputs].float(), cast("Tensor | None", linear.bias)
    bias = None if bias is None else bias[:outputs]
    packed = weight  # as a widened part of a matrix is
    if isinstance(linear, CpuLinear):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, BLOCK_ROWS)
    generator, seconds = torch.Generator().manual_seed(0), [0.0, 0.0]
    for rows in _COMPARED_ROWS:
        x = torch.randn(rows, weight.shape[1], generator=generator)
        products = (partial(F.linear, x, weight, bias), partial(_onednn, x, packed, bias))
        expected, out = (product() for product in products)
        error = ((out - expected).norm() / expected.norm().clamp_min(1e-20)).item()
        if not error <= _TOLERANCE:  # also for NaN
            raise RuntimeError(f"its products differ by {error:.0e} of their norm")
        for i, product in enumerate(products):
            seconds[i] += min(_thread_seconds(product) for _ in range(2))
    return seconds[0], seconds[1]


def _onednn(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _thread_seconds(work: Callable[[], object]) -> float:
    start = time.thread_time()
    work()
    return time.thread_time() - start


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
