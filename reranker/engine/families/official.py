"""The official Qwen3-Reranker models by their shapes: what they need in memory, without their files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from reranker.engine.checkpoint.tensors import Stored
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.families.base import Widths
from reranker.engine.families.decoder import widths
from reranker.engine.footprint import Footprint, footprint
from reranker.engine.precision import between, computable, short

_GIB = 1 << 30
OFFICIAL: Mapping[str, tuple[int, int, int, int, int, bool]] = {
    "Qwen3-Reranker-0.6B": (1024, 3072, 28, 16, 8, True),
    "Qwen3-Reranker-4B": (2560, 9728, 36, 32, 8, True),
    "Qwen3-Reranker-8B": (4096, 12288, 36, 32, 8, False),
}
"""hidden_size, intermediate_size, layers, attention heads, key-value heads, tied embeddings; from their config.json."""
OFFICIAL_PREFIX = 60
"""Tokens of their static prefix."""


class Described(NamedTuple):
    """A model as its headers and its config.json describe it."""

    name: str
    weights: Weights
    widths: Widths
    prefix_tokens: int

    def needs(self, precision: torch.dtype, between: torch.dtype) -> Footprint:
        """See `footprint`; on a GPU."""
        return footprint(self.weights, self.widths, precision, between, self.prefix_tokens, on_cpu=False)


class _Headers(Weights):
    """Weights of which only the headers exist."""

    def __init__(self, name: str, stored: dict[str, Stored]) -> None:
        self.path, self.adapter, self.layout = Path(name), None, None
        self.stored, self.files = stored, dict.fromkeys(stored, Path(name))


@cache
def official(name: str) -> Described:
    """Describe one of the official models, in bfloat16 as it is stored; `name` is a key of OFFICIAL."""
    hidden, intermediate, layers, heads, groups, tied = OFFICIAL[name]
    settings: dict[str, Any] = {
        "vocab_size": 151_669,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": 128,
        "tie_word_embeddings": tied,
    }
    config = Qwen3Config(**settings)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    stored = {name: Stored(tuple(tensor.shape), "BF16") for name, tensor in model.state_dict().items()}
    return Described(name, _Headers(name, stored), widths(config), OFFICIAL_PREFIX)


def largest_official(device: torch.device, available: int) -> str:
    """Return the largest official model that fits into so many bytes, in its most exact precision, for an error."""
    for name in reversed(list(OFFICIAL)):
        for precision in computable(device):
            needed = official(name).needs(precision, between(precision, device)).needed
            if needed <= available:
                return f", such as {name} in {short(precision)} ({needed / _GIB:.2f} GiB)"
    return "; no official one fits"
