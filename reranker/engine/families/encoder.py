"""Encoders that read a query and a document as a pair: bidirectional, scored by a classifier over the first token.

A pair is tokenised as the tokenizer's post-processor does it. The modules are transformers' own; the forward pass is
not: pairs are packed without padding, projections of the same input are one matrix, and of the last layer only the
tokens that are read are computed. tests/engine/test_encoders.py compares it with transformers, one pair at a time.
"""

from __future__ import annotations

import copy
import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PretrainedConfig

from reranker.engine.attention import Attention
from reranker.engine.batch import PackedBatch
from reranker.engine.bidirectional import PairAttention
from reranker.engine.checkpoint.config import Checkpoint
from reranker.engine.checkpoint.files import refuse_if
from reranker.engine.checkpoint.layout import read_layout, warn_of_activation
from reranker.engine.checkpoint.tokenizer import check_tokenizer, warn_if_rebuilt
from reranker.engine.checkpoint.weights import Names, Weights
from reranker.engine.families.base import Backbone, Family, Head, LayerFns, Widths
from reranker.engine.families.labels import check_labels, label_head
from reranker.engine.families.loader import Loader, refuse_unread
from reranker.engine.template import Slot, Template


class Place(NamedTuple):
    """Where a layer computes its attention."""

    window: int | None
    """A token sees those at most so far away; None: its whole pair."""
    cos: Tensor
    sin: Tensor
    """Of the rotary position embedding; empty without one."""


class Encoder(Backbone):
    """A loaded encoder with the hidden layers of its head; see `Family.backbone`."""

    causal = False
    projections: ClassVar[tuple[tuple[str, ...], ...]]
    """See `Names.projections`."""
    others: ClassVar[tuple[str, ...]]
    """The other modules whose weights and biases are computed, beside the classifier: in a layer or in the model."""
    layers_name: ClassVar[str]
    """Of the list of layers, inside the base model."""
    classifier: ClassVar[str]
    """Name of the last linear layer, which is the engine's head."""
    intermediate: ClassVar[int]
    """Numbers per token inside the feed-forward part of a layer, as multiples of intermediate_size."""

    def __init__(self, loader: Loader, config: PretrainedConfig) -> None:
        config = copy.deepcopy(config)  # transformers writes the dtype into it
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                config, attn_implementation="sdpa", dtype=loader.compute_dtype
            ).eval()
        self.model: Any = model
        self.base: Any = model.base_model
        self.config: Any = config
        self.dtype = loader.compute_dtype
        self.vocab_size: int = config.vocab_size
        self.activation_width = self.activation(config)
        self.head_dim: int = config.hidden_size // config.num_attention_heads
        refuse_unread(model, self._unread())
        parent, _, leaf = self.classifier.rpartition(".")
        delattr(model.get_submodule(parent), leaf)
        self.layers: list[Any] = list(self.base.get_submodule(self.layers_name))
        prefix = f"{model.base_model_prefix}.{self.layers_name}"
        joined = {f"{prefix}.{i}.{p}" for i in range(len(self.layers)) for parts in self.projections for p in parts}
        for name in [name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in joined]:
            self._read(loader, name)
        for i, layer in enumerate(self.layers):
            self._join(loader, layer, f"{prefix}.{i}")

    @classmethod
    def activation(cls, config: PretrainedConfig) -> int:
        """See `Widths.activation`."""
        return int(12 * config.hidden_size + cls.intermediate * config.intermediate_size)

    def _unread(self) -> list[str]:
        """Return the parameters of transformers' module that the pass does not compute."""
        root = self.model.base_model_prefix
        inside = re.compile(rf"^{root}\.(?:{re.escape(self.layers_name)}\.\d+\.)?")
        computed = {*self.others, self.classifier, *(part for parts in self.projections for part in parts)}
        known = {f"{module}.{kind}" for module in computed for kind in ("weight", "bias")}
        return [name for name, _ in self.model.named_parameters() if inside.sub("", name) not in known]

    def _join(self, loader: Loader, layer: nn.Module, name: str) -> None:
        """Load the projections of a layer; the first of several becomes all of them."""
        for parts in self.projections:
            parent = parts[0].rpartition(".")[0]
            leaves = [part.rpartition(".")[2] for part in parts]
            module = layer.get_submodule(parent)
            setattr(module, leaves[0], loader.projection(module, f"{name}.{parent}", *leaves))

    def _read(self, loader: Loader, name: str) -> None:
        """Load a parameter: embeddings at most as wide as they are stored, the head in float32."""
        parent, _, leaf = name.rpartition(".")
        module, tensor = self.model.get_submodule(parent), loader.weights.tensor(name)
        dtype = self.dtype
        if isinstance(module, nn.Embedding):
            dtype = min(tensor.dtype, dtype, key=lambda dtype: dtype.itemsize)
        elif not name.startswith(f"{self.model.base_model_prefix}.") or ".pooler." in name:
            dtype = torch.float32
        setattr(module, leaf, loader.parameter(dtype, tensor))

    @abstractmethod
    def embed(self, batch: PackedBatch) -> Tensor:
        """Return the input of the first layer, [T, hidden_size]."""

    @abstractmethod
    def places(self, x: Tensor, batch: PackedBatch) -> list[Place]:
        """Return each layer's place; x [T, hidden_size]."""

    @abstractmethod
    def finish(self, x: Tensor) -> Tensor:
        """[rows, hidden_size], after the last layer -> the same in float32, normalised if the model does that."""

    @abstractmethod
    def transform(self, pooled: Tensor) -> Tensor:
        """[N, hidden_size] float32 -> [N, hidden_size]: the input of the classifier."""

    @property
    def mean(self) -> bool:
        """Whether the classifier reads the mean of all tokens, not the first one."""
        return False

    def hidden(self, batch: PackedBatch, kernel: type[Attention], layer_fns: LayerFns) -> Tensor:
        """See `Backbone.hidden`; [N, hidden_size] is the input of the classifier."""
        x = self.embed(batch)
        places = self.places(x, batch)
        create: type[PairAttention] = kernel
        attentions = {window: create(batch, window) for window in {place.window for place in places}}
        first = batch.last - batch.position_ids[batch.last]  # positions start at 0
        scale = self.head_dim**-0.5
        only_first = not self.mean and places[-1].window is None
        for layer, place in zip(self.layers[: -1 if only_first else None], places, strict=False):
            q, k, v = layer_fns.before(layer, x, place.cos, place.sin)
            x = layer_fns.after(layer, x, attentions[place.window].attend_all(q, k, v, scale))
        if only_first:
            q, k, v = layer_fns.before(self.layers[-1], x, places[-1].cos, places[-1].sin)
            attended = attentions[None].attend_last(q[first], k, v, scale)
            return self.transform(self.finish(self.eager.after(self.layers[-1], x[first], attended)))
        if not self.mean:
            return self.transform(self.finish(x[first]))
        starts, _, _ = batch.cu_seqlens
        means = torch.segment_reduce(self.finish(x), "mean", offsets=starts.long(), unsafe=True)
        return self.transform(means[torch.searchsorted(starts, batch.last.int(), right=True) - 1])

    def cache_prefix(self, tokens: list[int], kernel: type[Attention]) -> None:
        """Pairs share no prefix: there is nothing to cache."""
        raise AssertionError("pairs share no prefix")


class EncoderFamily(Family):
    """An encoder with a classifier of one label, or of two of which the second is relevance."""

    encoder: ClassVar[type[Encoder]]
    auto_class = AutoModelForSequenceClassification

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        path, config, tokenizer, adapter, _ = checkpoint
        advice = "merge it into its base with merge_and_unload(), and save that"
        refuse_if(adapter, f"LoRA adapters of encoders are not merged here ({adapter}): {advice}")
        check_labels(path / "config.json", config)
        saved = getattr(config, "sentence_transformers", None)  # by its releases 4 and 5, and by those before
        name = saved.get("activation_fn") if isinstance(saved, dict) else None
        warn_of_activation(path, name or getattr(config, "sbert_ce_default_activation_function", None))
        special = frozenset(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
        layout = read_layout(checkpoint.folders, tokenizer, special, pairs=True)
        self.template = pair_template(path, tokenizer, special)
        self.max_positions = min(self.positions, layout.max_length or self.positions)
        folder = Path(tokenizer.name_or_path)
        check_tokenizer(folder, tokenizer, config.vocab_size, self.template.own_tokens)
        warn_if_rebuilt(folder, tokenizer)

    @property
    def positions(self) -> int:
        """Tokens of the longest pair that the model has positions for."""
        return int(self.checkpoint.config.max_position_embeddings)

    @property
    @abstractmethod
    def embeddings(self) -> tuple[str, ...]:
        """See `Names.embeddings`."""

    @property
    def widths(self) -> Widths:
        """See `Family.widths`."""
        activation = self.encoder.activation(self.checkpoint.config)
        return Widths(activation, 0, Names(self.encoder.projections, self.embeddings))

    def head(self, weights: Weights) -> Head:
        """See `Family.head`."""
        name = self.encoder.classifier
        return label_head(weights.path, weights.tensor(f"{name}.weight"), weights.tensor(f"{name}.bias"))

    def backbone(self, loader: Loader) -> Backbone:
        """See `Family.backbone`."""
        encoder = self.encoder(loader, self.checkpoint.config)
        encoder.positions = self.positions
        return encoder


def pair_template(path: Path, tokenizer: Any, control_tokens: frozenset[str]) -> Template:
    """Return a pair as the tokenizer's post-processor writes it.

    Raises:
        ModelLoadError: it does not write the query, and after it the document.
    """
    encoded = tokenizer("x", "x")
    slots = {0: Slot.QUERY, 1: Slot.DOCUMENT}
    parts: list[str | Slot] = []
    for token, sequence in zip(encoded["input_ids"], encoded.sequence_ids(0), strict=True):
        text = slots[sequence] if sequence is not None else str(tokenizer.convert_ids_to_tokens(token))
        if isinstance(text, str) and parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif not (isinstance(text, Slot) and text in parts):
            parts.append(text)
    form = [part for part in parts if isinstance(part, Slot)]
    framed = isinstance(parts[0], str) and isinstance(parts[-1], str) and len(parts) == 5
    problem = f"the tokenizer in {path} writes no pair of query and document between special tokens (post_processor)"
    refuse_if(form != [Slot.QUERY, Slot.DOCUMENT] or not framed, f"{problem}: use the tokenizer of these weights")
    return Template(None, tuple(parts), None, control_tokens, "the tokenizer's pair", pair=True)
