"""The memory that a model needs in a precision, from its config.json and the headers of its weights alone.

`load` refuses by it what does not fit, `auto` chooses 8 bits by it, and plan.py prints it.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from reranker.engine.budget import MIN_BATCH_TOKENS
from reranker.engine.checkpoint.weights import DECODER, HEAD, Names, Weights
from reranker.engine.families.base import Widths
from reranker.engine.precision import FLOAT8, QUANTIZED

_GIB = 1 << 30
_SCALE_BYTES = 16
"""Of a quantised projection for each output: scale, zero point and the kernel's own sum."""
_QUANTIZING_BYTES = {torch.int8: 9, FLOAT8: 10}
"""For each weight of a projection while it is quantised: as stored, scaled in float32, and rounded (quantized.py)."""
_COMPARING_BYTES = 6
"""For each weight of a projection that is taken as stored: widened on the device, and in float32 (quantized.py)."""
_WIDENING_BYTES = 8
"""For each weight while it is widened, or an adapter merged, on the CPU: in float32, and a scale or the sum."""
_QUANTIZED_BYTES = 4
"""For each number of a token between quantised products: those are float32 before they are rounded or scaled."""


class Footprint(NamedTuple):
    """Bytes on the device, at most."""

    weights: int
    """Of the loaded weights."""
    loading: int
    """Of the weights in work while they are loaded."""
    batch: int
    """Of the activations of the smallest full batch, MIN_BATCH_TOKENS tokens."""
    prefix: int
    """Of the cached start of the prompt."""

    @property
    def needed(self) -> int:
        """To load the model, and then to score."""
        return self.weights + max(self.loading, self.batch + self.prefix)

    def __str__(self) -> str:
        parts = zip(self._fields, self, strict=True)
        return f"{self.needed / _GIB:.2f} GiB ({', '.join(f'{name} {size / _GIB:.2f}' for name, size in parts)})"


def footprint(
    weights: Weights,
    widths: Widths,
    precision: torch.dtype,
    between: torch.dtype,
    prefix_tokens: int,
    on_cpu: bool = True,
) -> Footprint:
    """Return the memory of a model.

    Args:
        weights: the headers; no tensor is read.
        widths: those of the model's family.
        precision: of the products of the layers.
        between: of everything else (`precision.between`).
        prefix_tokens: the length of the static prefix.
        on_cpu: whether weights are widened and merged in the memory that is counted.
    """
    held, loading = weight_bytes(weights, precision, between, on_cpu, widths.names)
    size = _QUANTIZED_BYTES if precision in QUANTIZED else between.itemsize
    batch = MIN_BATCH_TOKENS * widths.activation * size
    return Footprint(held, loading, batch, prefix_tokens * widths.cached * between.itemsize)


def weight_bytes(
    weights: Weights, precision: torch.dtype, between: torch.dtype, on_cpu: bool = True, names: Names = DECODER
) -> tuple[int, int]:
    """Return the bytes of the loaded weights, and those of the largest weight in work while they are loaded.

    Weights are in work if they are quantised here, compared with what a quantised checkpoint stores, or, on the CPU,
    widened or merged with an adapter. Joined projections are in work together.
    """
    as_stored = weights.precision is precision
    joined = {name: _joined(name, names.projections) for name in weights.stored}
    kept = {joined[name] for name in weights.stored if as_stored and weights.is_wide(name)}
    embeddings = {weights.source(name) for name in names.embeddings}
    merged = {} if weights.adapter is None else weights.adapter.pairs
    held, work = 0, Counter[str]()
    for name, stored in weights.stored.items():
        projection = joined[name] != name and precision in QUANTIZED
        quantized = projection and joined[name] not in kept
        rounding = (_COMPARING_BYTES if as_stored else _QUANTIZING_BYTES[precision]) if projection else 0
        widening = 0 if not on_cpu or (weights.is_wide(name) and name not in merged) else _WIDENING_BYTES
        work[joined[name]] += stored.numel * max(rounding, widening)
        if quantized:
            held += stored.numel * precision.itemsize + stored.shape[0] * _SCALE_BYTES
        elif name in embeddings:
            held += stored.numel * min(stored.itemsize, between.itemsize)
        elif name != HEAD:
            held += stored.numel * between.itemsize
    return held, max(work.values(), default=0)


def _joined(name: str, projections: tuple[tuple[str, ...], ...]) -> str:
    """Return the same for weights that are joined into one projection; other tensors keep their name."""
    for parts in projections:
        if part := next((part for part in parts if name.endswith(f".{part}.weight")), None):
            return name.removesuffix(f"{part}.weight") + parts[0]
    return name
