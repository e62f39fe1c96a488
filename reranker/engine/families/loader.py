"""Parameters of a model whose modules are on the meta device, read from a checkpoint one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from reranker.engine.checkpoint.weights import Weights
from reranker.errors import ModelLoadError

Wrap = Callable[[nn.Linear, Sequence[str]], nn.Module]
"""Replaces a projection, for example by a quantised one; the second argument has the names of its joined weights."""


@dataclass(frozen=True, slots=True)
class Loader:
    """Replaces parameters on the meta device by those of a checkpoint."""

    weights: Weights
    """As `check_weights` accepted them."""
    device: torch.device
    """Where they are computed."""
    stored_dtype: torch.dtype
    """Of the projections that `wrap` receives."""
    compute_dtype: torch.dtype
    """Of everything between the projections."""
    wrap: Wrap = lambda linear, names: linear
    """Replaces each projection."""

    def norm(self, norm: Any, name: str) -> None:
        """Load the weight of a norm."""
        norm.weight = self.parameter(self.compute_dtype, self.weights.tensor(f"{name}.weight"))

    def projection(self, module: nn.Module, name: str, *parts: str) -> nn.Module:
        """Return projections of the same input as one; they are deleted from the module."""
        linears: list[nn.Linear] = [getattr(module, part) for part in parts]
        bias, outputs = linears[0].bias is not None, sum(linear.out_features for linear in linears)
        joined = nn.Linear(linears[0].in_features, outputs, bias=bias, device="meta")
        for kind in ("weight", "bias")[: 1 + bias]:
            stored = (self.weights.tensor(f"{name}.{part}.{kind}") for part in parts)
            setattr(joined, kind, self.parameter(self.stored_dtype, *stored))
        for part in parts:
            delattr(module, part)
        return self.wrap(joined, [f"{name}.{part}.weight" for part in parts])

    def parameter(self, dtype: torch.dtype, *parts: Tensor) -> nn.Parameter:
        """Copy tensors, one below the other, into new memory of the device, which needs no other for it.

        On a CPU too: through a view, a file that is overwritten in place would become a part of the loaded model.
        """
        joined = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=dtype, device=self.device)
        for place, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
            place.copy_(part)
        return nn.Parameter(joined, requires_grad=False)


def refuse_unread(module: nn.Module, unread: Iterable[str]) -> None:
    """Refuse a module of transformers for the first of its tensors that a pass does not read."""
    for name in unread:
        problem = f"{type(module).__name__} of the installed transformers has {name}, which is not computed"
        raise ModelLoadError(f"{problem}: install the version in requirements.txt")
