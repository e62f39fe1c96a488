"""ModernBERT cross-encoders, such as gte-reranker-modernbert and granite-embedding-reranker.

Most layers see a window of tokens around each token, every third one the whole pair, with another base of the rotary
position embedding. Source of the formulas: transformers' modeling_modernbert.py.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.config import Checkpoint, check_numbers
from reranker.engine.checkpoint.files import refuse_if
from reranker.engine.families.base import LayerFns
from reranker.engine.families.encoder import Encoder, EncoderFamily, Place
from reranker.engine.linear import in_blocks


def before_attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `LayerFns.before`; cos [T, 1, 1, D], sin [T, 1, 1, D / 2]"""
    heads = layer.attn.Wqkv(layer.attn_norm(x)).unflatten(-1, (3, -1, layer.attn.head_dim))
    rotated = heads[:, :2] * cos
    (first, second), (left, right) = heads[:, :2].chunk(2, dim=-1), rotated.chunk(2, dim=-1)
    left.addcmul_(second, sin, value=-1)
    right.addcmul_(first, sin)
    q, k = rotated.to(x.dtype).unbind(1)
    return q, k, heads[:, 2]


def after_attention(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """See `LayerFns.after`."""
    return in_blocks(partial(_feed_forward, layer), x, attended)


def _feed_forward(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return the output of a layer for some tokens."""
    x = x + layer.attn.Wo(attended.flatten(1))
    inner, gate = layer.mlp.Wi(layer.mlp_norm(x)).chunk(2, dim=-1)
    out: Tensor = x + layer.mlp.Wo(layer.mlp.act(inner) * gate)
    return out


class ModernBertEncoder(Encoder):
    """ModernBERT's layers."""

    eager = LayerFns(before_attention, after_attention)
    projections = (("attn.Wqkv",), ("attn.Wo",), ("mlp.Wi",), ("mlp.Wo",))
    others = (
        *("embeddings.tok_embeddings", "embeddings.norm", "attn_norm", "mlp_norm", "final_norm"),
        *("head.dense", "head.norm"),
    )
    layers_name = "layers"
    classifier = "classifier"
    intermediate = 4

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        device = self.base.final_norm.weight.device
        self.base.rotary_emb = type(self.base.rotary_emb)(self.config).to(device)  # its buffers are not stored

    @property
    def mean(self) -> bool:
        """See `Encoder.mean`."""
        return bool(self.config.classifier_pooling == "mean")

    def embed(self, batch: PackedBatch) -> Tensor:
        """See `Encoder.embed`."""
        parts = self.base.embeddings
        out: Tensor = parts.norm(parts.tok_embeddings(batch.input_ids).to(self.dtype))
        return out

    def places(self, x: Tensor, batch: PackedBatch) -> list[Place]:
        """See `Encoder.places`."""
        windows = {"full_attention": None, "sliding_attention": self.config.sliding_window}
        kinds: dict[str, Place] = {}
        for kind in set(self.config.layer_types):
            cos, sin = self.base.rotary_emb(x[:0].float(), batch.position_ids[None], kind)
            kinds[kind] = Place(windows[kind], cos[0, :, None, None], sin[0, :, None, None, : sin.shape[-1] // 2])
        return [kinds[kind] for kind in self.config.layer_types]

    def finish(self, x: Tensor) -> Tensor:
        """See `Encoder.finish`."""
        norm = self.base.final_norm
        bias = None if norm.bias is None else norm.bias.float()
        return F.layer_norm(x.float(), norm.normalized_shape, norm.weight.float(), bias, norm.eps)

    def transform(self, pooled: Tensor) -> Tensor:
        """See `Encoder.transform`."""
        out: Tensor = self.model.head(pooled)
        return out


class ModernBert(EncoderFamily):
    """A ModernBERT cross-encoder."""

    name = "ModernBERT"
    encoder = ModernBertEncoder
    embeddings = ("model.embeddings.tok_embeddings.weight",)

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        file, config = checkpoint.path / "config.json", checkpoint.config
        for kind in sorted(set(config.layer_types)):
            known = kind in ("full_attention", "sliding_attention")
            refuse_if(not known, f"{file} has layers of the type {kind[:40]!r}, which are not computed")
            rope = config.rope_parameters[kind]["rope_type"]
            refuse_if(rope != "default", f"{file} has the rope type {rope[:40]!r}, which is not computed: remove it")

    @staticmethod
    def check_settings(file: Path, settings: dict[str, Any]) -> None:
        """See `Family.check_settings`."""
        pooling = settings.get("classifier_pooling")
        refuse_if(pooling not in (None, "cls", "mean"), f"{file} has classifier_pooling={pooling!r}, not cls or mean")
        check_numbers(file, settings, "norm_eps", "local_attention", "max_position_embeddings")
