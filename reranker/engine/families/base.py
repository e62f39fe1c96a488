"""The seam between the engine and a model family.

`Family` checks a checkpoint's folder before the weights; `Backbone` computes hidden states once they are loaded; `Head`
turns a hidden state into a logit. A family is one file that implements the first two, and one line of the registry.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from reranker.engine.attention import Attention
from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.config import Checkpoint
from reranker.engine.checkpoint.weights import DECODER, Names, Weights
from reranker.engine.families.loader import Loader
from reranker.engine.template import Template


@dataclass(frozen=True, slots=True)
class Head:
    """logit = hidden @ weight + bias; the family multiplies both by its scale."""

    weight: Tensor
    """[hidden_size] float32"""
    bias: float = 0.0
    name: str = "logit"
    """What the logit is, in words."""

    def logits(self, hidden: Tensor) -> Tensor:
        """[N, hidden_size] float32 -> [N]"""
        logits = hidden @ self.weight
        return logits + self.bias if self.bias else logits


class LayerFns(NamedTuple):
    """The two halves of a layer: before and after its attention."""

    before: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """layer, x [T, hidden], cos, sin -> q [T, H, D], k and v [P + T, G, D]"""
    after: Callable[[Any, Tensor, Tensor], Tensor]
    """layer, x [T, hidden], attended [T, H, D] -> [T, hidden]"""


class Widths(NamedTuple):
    """Numbers per token, from config.json, and which weights are projections."""

    activation: int
    """Upper bound of those that a layer holds at the same time."""
    cached: int
    """Those of the cached prefix, in all layers."""
    names: Names = DECODER


class Backbone(ABC):
    """A loaded model without its head."""

    causal: ClassVar[bool]
    """Whether a prefix's keys and values do not depend on the document, so that they can be shared and cached."""
    eager: ClassVar[LayerFns]
    vocab_size: int
    head_dim: int
    """Of its queries and keys."""
    positions: int | None = None
    """Tokens of the longest pair; None: there is no such limit."""
    activation_width: int
    """Upper bound of the numbers per token that a layer holds at the same time."""

    @abstractmethod
    def hidden(self, batch: PackedBatch, kernel: type[Attention], layer_fns: LayerFns) -> Tensor:
        """Return the last token's final hidden state of each document, [N, hidden_size] float32.

        The batch and all weights are on one device. The last layer's N rows always take the eager path.
        """

    @abstractmethod
    def cache_prefix(self, tokens: list[int], kernel: type[Attention]) -> None:
        """Cache the keys and values of the static prefix in every layer: [P, G, D], P = len(tokens).

        From then on batches must be packed with `static_prefix_len=P`.
        """


class Family(ABC):
    """A model family with a checkpoint that it computes, before the weights are loaded.

    Raises:
        ModelLoadError: the checkpoint lacks a part that the family needs, or describes another computation.
    """

    name: ClassVar[str]
    template: Template
    """The family's prompt, or the checkpoint's own."""
    max_length: int | None = None
    """Tokens at which the checkpoint's own files truncate a prompt; None: they do not say."""
    max_positions: int | None = None
    """Tokens of the longest prompt that can be computed; None: there is no such limit."""
    auto_class: Any
    """transformers' class that describes the whole model."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @property
    @abstractmethod
    def widths(self) -> Widths:
        """What a pass needs in memory."""

    @staticmethod
    @abstractmethod
    def check_settings(file: Path, settings: dict[str, Any]) -> None:
        """Raise ModelLoadError if config.json describes another computation; transformers reads it afterwards."""

    @abstractmethod
    def head(self, weights: Weights) -> Head:
        """Read the head, on the CPU; raise ModelLoadError if it gives every document the same score."""

    @abstractmethod
    def backbone(self, loader: Loader) -> Backbone:
        """Load the layers onto the loader's device, one at a time."""
