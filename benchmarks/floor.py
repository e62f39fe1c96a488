"""The floor: the time of nothing but the matrix products of the packed tokens, at the highest rate of this machine.

On a CPU that rate is the number of cores times the rate of one thread, because cores that split a product wait for each
other; the fastest of torch's and oneDNN's products counts, in float32 or in the precision asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.encoder_models import ENCODERS
from benchmarks.models import SHAPES

ROWS = {"cpu": 1024, "cuda": 16_384}
"""Tokens of the measured products: about those of a pass."""
SECONDS = 0.3
"""For each kind of product."""


@dataclass(frozen=True, slots=True)
class Floor:
    """The least time for a number of tokens."""

    seconds: float
    processor_seconds: float
    gflops: float
    """Of one thread; on a GPU, of the device."""
    product: str
    """The fastest kind."""


def matrices(shape: str) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of the linear layers in one layer of a model."""
    if shape in ENCODERS:
        hidden, intermediate, _, _ = ENCODERS[shape]
        return [(hidden, hidden, 4), (hidden, intermediate, 1), (intermediate, hidden, 1)]
    hidden, intermediate, _, heads, kv_heads, head_dim, _ = SHAPES[shape]
    return [
        (hidden, heads * head_dim, 1),
        (hidden, kv_heads * head_dim, 2),
        (heads * head_dim, hidden, 1),
        (hidden, intermediate, 2),
        (intermediate, hidden, 1),
    ]


def flop(shape: str, tokens: int) -> int:
    """Floating-point operations of all linear layers for `tokens` tokens."""
    layers = (ENCODERS.get(shape) or SHAPES[shape])[2]
    return 2 * layers * tokens * sum(i * o * n for i, o, n in matrices(shape))


def floor(shape: str, device: str, dtype: torch.dtype, tokens: int, cores: int) -> Floor:
    """Measure the products of one layer of a shape, and scale them to `tokens` tokens and, on a CPU, to `cores`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        measured = {kind: _rate(shape, device, dtype_, one) for kind, (dtype_, one) in _products(device, dtype).items()}
    finally:
        torch.set_num_threads(threads)
    product, rate = max(measured.items(), key=lambda item: item[1])
    needed = flop(shape, tokens) / rate
    return Floor(needed / cores if device == "cpu" else needed, needed, rate / 1e9, product)


Product = Callable[[Tensor, Tensor], Callable[[], object]]
"""An input [tokens, in] and a weight [out, in] -> a call that multiplies them."""


def _products(device: str, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, Product]]:
    kinds: dict[str, tuple[torch.dtype, Product]] = {}
    for precision in {torch.float32, dtype} if device == "cpu" else {dtype}:
        name = str(precision).removeprefix("torch.")
        kinds[f"torch, {name}"] = (precision, _plain)
        if device == "cpu" and torch.backends.mkldnn.is_available():
            kinds[f"oneDNN, {name}"] = (precision, _mkldnn)
    return kinds


def _plain(x: Tensor, weight: Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weight)


def _mkldnn(x: Tensor, weight: Tensor) -> Callable[[], object]:
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@torch.inference_mode()
def _rate(shape: str, device: str, dtype: torch.dtype, product: Product) -> float:
    """Operations a second: on a CPU of processor time, because other processes may share the core."""
    rows, calls = ROWS[device], []
    clock = time.thread_time if device == "cpu" else time.perf_counter
    for inputs, outputs, count in matrices(shape):
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        calls += [product(x, torch.randn(outputs, inputs, device=device, dtype=dtype)) for _ in range(count)]
    for call in calls:
        call()
    _synchronise(device)
    start, times = clock(), 0
    while times < 3 or clock() - start < SECONDS:
        for call in calls:
            call()
        times += 1
    _synchronise(device)
    layer = 2 * rows * sum(i * o * n for i, o, n in matrices(shape))
    return layer * times / (clock() - start)


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
