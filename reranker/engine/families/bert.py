"""BERT and XLM-RoBERTa cross-encoders, such as ms-marco-MiniLM and bge-reranker.

Source of the formulas: transformers' modeling_bert.py and modeling_xlm_roberta.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import XLMRobertaConfig

from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.config import Checkpoint, check_numbers
from reranker.engine.checkpoint.files import refuse_if
from reranker.engine.families.base import Backbone, LayerFns
from reranker.engine.families.encoder import Encoder, EncoderFamily, Place
from reranker.engine.families.loader import Loader
from reranker.engine.linear import in_blocks

_COMPUTED: dict[str, tuple[Any, ...]] = {
    "is_decoder": (False, None),
    "add_cross_attention": (False, None),
    "position_embedding_type": ("absolute", None),
}
"""Fields that change the computation, with the values that are computed here. Null counts as absent."""


def before_attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `LayerFns.before`; `query` is the joined projection."""
    attention = layer.attention.self
    q, k, v = attention.query(x).unflatten(-1, (3, -1, attention.attention_head_size)).unbind(1)
    return q, k, v


def after_attention(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """See `LayerFns.after`."""
    return in_blocks(partial(_feed_forward, layer), x, attended)


def _feed_forward(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return the output of a layer for some tokens."""
    output = layer.attention.output
    x = output.LayerNorm(output.dense(attended.flatten(1)) + x)
    inner = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x))
    out: Tensor = layer.output.LayerNorm(layer.output.dense(inner) + x)
    return out


class BertEncoder(Encoder):
    """BERT's layers, embeddings and pooler."""

    eager = LayerFns(before_attention, after_attention)
    projections = (
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        ("attention.output.dense",),
        ("intermediate.dense",),
        ("output.dense",),
    )
    others = (
        *(f"embeddings.{part}" for part in ("word_embeddings", "position_embeddings", "token_type_embeddings")),
        *("embeddings.LayerNorm", "attention.output.LayerNorm", "output.LayerNorm", "pooler.dense"),
    )
    layers_name = "encoder.layer"
    classifier = "classifier"
    intermediate = 2
    separator: int | None = None
    """The token after the query, and after the document, if the model tells them apart by token types."""

    @property
    def first_position(self) -> int:
        """Position of the first token."""
        return 0

    def embed(self, batch: PackedBatch) -> Tensor:
        """See `Encoder.embed`."""
        parts, ids = self.base.embeddings, batch.input_ids
        types = torch.zeros_like(ids)
        if self.separator is not None:  # twice in each pair, and never in a text
            ends = (ids == self.separator).long()
            types = (ends.cumsum(0) - ends) % 2
        x = parts.word_embeddings(ids).to(self.dtype) + parts.token_type_embeddings(types).to(self.dtype)
        x = x + parts.position_embeddings(batch.position_ids + self.first_position).to(self.dtype)
        out: Tensor = parts.LayerNorm(x)
        return out

    def places(self, x: Tensor, batch: PackedBatch) -> list[Place]:
        """See `Encoder.places`."""
        return [Place(None, x[:0], x[:0])] * len(self.layers)

    def finish(self, x: Tensor) -> Tensor:
        """See `Encoder.finish`."""
        return x.float()

    def transform(self, pooled: Tensor) -> Tensor:
        """See `Encoder.transform`."""
        return torch.tanh(self.base.pooler.dense(pooled))


class XlmRobertaEncoder(BertEncoder):
    """BERT's layers; positions start after the padding's, and the dense layer is the classifier's."""

    others = (*BertEncoder.others, "classifier.dense")
    classifier = "classifier.out_proj"

    @property
    def first_position(self) -> int:
        """See `BertEncoder.first_position`."""
        return int(self.config.pad_token_id) + 1

    def transform(self, pooled: Tensor) -> Tensor:
        """See `Encoder.transform`."""
        return torch.tanh(self.model.classifier.dense(pooled))


class Bert(EncoderFamily):
    """A BERT cross-encoder."""

    name = "BERT"
    encoder: ClassVar[type[BertEncoder]] = BertEncoder
    root: ClassVar[str] = "bert"

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        config, tokenizer = checkpoint.config, checkpoint.tokenizer
        encoded = tokenizer("x", "x")
        ids, types = encoded["input_ids"], encoded.get("token_type_ids") or [0]
        self.separator: int | None = ids[-1] if any(types) else None
        """See `BertEncoder.separator`."""
        if self.separator is not None:
            end = ids.index(self.separator) + 1
            regular = types == [0] * end + [1] * (len(ids) - end) and ids.count(self.separator) == 2
            problem = f"the tokenizer in {checkpoint.path} gives a pair token types that are not computed"
            refuse_if(not regular or config.type_vocab_size < 2, f"{problem} ({types}): it is of another model")

    @staticmethod
    def check_settings(file: Path, settings: dict[str, Any]) -> None:
        """See `Family.check_settings`."""
        for field, values in _COMPUTED.items():
            value = settings.get(field)
            refuse_if(value not in values, f"{file} has {field}={value!r}: it is computed with {values[0]!r} here")
        check_numbers(file, settings, "layer_norm_eps", "max_position_embeddings")

    @property
    def embeddings(self) -> tuple[str, ...]:
        """See `EncoderFamily.embeddings`."""
        parts = ("word", "position", "token_type")
        return tuple(f"{self.root}.embeddings.{part}_embeddings.weight" for part in parts)

    def backbone(self, loader: Loader) -> Backbone:
        """See `Family.backbone`."""
        encoder = super().backbone(loader)
        assert isinstance(encoder, BertEncoder)
        encoder.separator = self.separator
        return encoder


class XlmRoberta(Bert):
    """An XLM-RoBERTa cross-encoder."""

    name = "XLM-RoBERTa"
    encoder = XlmRobertaEncoder
    root = "roberta"

    @staticmethod
    def check_settings(file: Path, settings: dict[str, Any]) -> None:
        """See `Family.check_settings`."""
        Bert.check_settings(file, settings)
        pad = settings.get("pad_token_id", XLMRobertaConfig.pad_token_id)
        problem = f"{file} has pad_token_id={str(pad)[:40]}"
        refuse_if(type(pad) is not int or pad < 0, f"{problem}: positions start after it (XLM-RoBERTa's is 1)")

    @property
    def positions(self) -> int:
        """See `EncoderFamily.positions`: the first `pad_token_id + 1` are not used."""
        config = self.checkpoint.config
        return int(config.max_position_embeddings) - int(config.pad_token_id) - 1
