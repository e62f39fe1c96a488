"""Qwen3-Reranker: its prompt, and the Qwen3 decoder on a packed batch.

Source of the prompt: the transformers sample of the Qwen3-Reranker model card.

The weights and modules are transformers' own; the forward pass is not. Only the last token of each document is read, so
the last layer computes queries, keys and values for T tokens and everything else for N; projections of the same input
are one matrix; norms, rotary embedding and SwiGLU run fused or in place (in eager transformers they take a third of the
time on a CPU). tests/engine/test_scorer.py compares it with `Qwen3ForCausalLM.forward`, one pair at a time. Source of
the formulas: transformers' modeling_qwen3.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm

from reranker.engine.attention import Attention
from reranker.engine.batch import PackedBatch, pack
from reranker.engine.families.base import Backbone, LayerFns, Wrap
from reranker.engine.families.causal import CausalFamily
from reranker.engine.template import Slot, Template
from reranker.request.template import SUFFIX, SYSTEM
from reranker.types import EncodedRequest, Slice

CONTROL_TOKENS = frozenset(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>".split()
)
TEMPLATE = Template(
    instructed=(
        f"{SYSTEM}<Instruct>: ",
        Slot.INSTRUCTION,
        "\n<Query>: ",
        Slot.QUERY,
        "\n<Document>: ",
        Slot.DOCUMENT,
        SUFFIX,
    ),
    plain=None,
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    control_tokens=CONTROL_TOKENS,
)
_ZERANK = "<|im_start|>system\n\0<|im_end|>\n<|im_start|>user\n\0<|im_end|>\n<|im_start|>assistant\n"


class Qwen3(CausalFamily):
    """Qwen3-Reranker, its fine-tunes, and other rerankers on the Qwen3 decoder."""

    name = "Qwen3"
    control_tokens = CONTROL_TOKENS
    card = TEMPLATE
    divisors: ClassVar[Mapping[tuple[str, str], float]] = {(_ZERANK, "Yes"): 5.0}
    """zerank: its authors write `(scores / 5).sigmoid()`."""


def before_attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `LayerFns.before`; cos [T, 1, D], sin [T, 1, D / 2]; `layer` is a fused Qwen3DecoderLayer."""
    attn = layer.self_attn
    heads = attn.qkv_proj(_norm(layer.input_layernorm, x)).unflatten(-1, (-1, attn.head_dim))
    groups = attn.config.num_key_value_heads
    q, k, v = heads.split([attn.config.num_attention_heads, groups, groups], dim=1)
    q, k = _rotate(_norm(attn.q_norm, q), cos, sin), _rotate(_norm(attn.k_norm, k), cos, sin)
    if attn.cached_k is None:
        return q, k, v
    return q, torch.cat([attn.cached_k, k]), torch.cat([attn.cached_v, v])


def after_attention(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """See `LayerFns.after`."""
    x = x + layer.self_attn.o_proj(attended.flatten(1))
    gate, up = layer.mlp.gate_up_proj(_norm(layer.post_attention_layernorm, x)).chunk(2, dim=-1)
    out: Tensor = x + layer.mlp.down_proj(F.silu(gate).mul_(up))
    return out


class Qwen3Backbone(Backbone):
    """The decoder of a Qwen3 model, its projections fused in place.

    Args:
        decoder: as transformers loaded it.
        dtype: of everything between the projections; the embeddings stay as stored, each row is cast when it is read.
        wrap: replaces each fused projection.
    """

    causal = True
    eager = LayerFns(before_attention, after_attention)

    def __init__(self, decoder: Qwen3Model, dtype: torch.dtype, wrap: Wrap = lambda linear: linear) -> None:
        self.decoder, config = decoder, cast("Any", decoder.config)
        self.vocab_size: int = config.vocab_size
        width = (config.num_attention_heads + 4 * config.num_key_value_heads) * self._layers[0].self_attn.head_dim
        self.activation_width = 4 * config.hidden_size + 2 * config.intermediate_size + 2 * width
        for layer in self._layers:
            _fuse(layer, wrap)
        for module in decoder.modules():
            if isinstance(module, Qwen3RMSNorm):
                module.to(dtype)

    @property
    def _layers(self) -> list[Any]:
        return list(cast("Iterable[Any]", self.decoder.layers))

    def hidden(self, batch: PackedBatch, kernel: type[Attention], layer_fns: LayerFns) -> Tensor:
        """See `Backbone.hidden`."""
        decoder, attention, layers = self.decoder, kernel(batch), self._layers
        norm = cast("Any", decoder.norm)
        x: Tensor = decoder.embed_tokens(batch.input_ids).to(norm.weight.dtype)  # [T, hidden]
        cos, sin = decoder.rotary_emb(x, batch.position_ids[None])  # [1, T, D]
        cos, sin = cos[0, :, None], sin[0, :, None, : sin.shape[-1] // 2]  # both halves of D are equal
        for layer in layers[:-1]:
            q, k, v = layer_fns.before(layer, x, cos, sin)
            x = layer_fns.after(layer, x, attention.attend_all(q, k, v, layer.self_attn.scaling))
        q, k, v = layer_fns.before(layers[-1], x, cos, sin)
        attended = attention.attend_last(q[batch.last], k, v, layers[-1].self_attn.scaling)
        hidden = self.eager.after(layers[-1], x[batch.last], attended).float()
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight.float(), norm.variance_epsilon)

    def cache_prefix(self, tokens: list[int], kernel: type[Attention]) -> None:
        """See `Backbone.cache_prefix`."""
        batch = pack([Slice(EncodedRequest(tokens, [tokens[-1:]]), 0, 1)]).to(self.decoder.norm.weight.device)
        computed: list[tuple[Tensor, Tensor]] = []

        def before(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = self.eager.before(layer, x, cos, sin)
            computed.append((k[: len(tokens)], v[: len(tokens)]))
            return q, k, v

        with torch.inference_mode():
            self.hidden(batch, kernel, LayerFns(before, self.eager.after))
        for layer, (k, v) in zip(self._layers, computed, strict=True):  # clones made here are no inference tensors
            layer.self_attn.cached_k, layer.self_attn.cached_v = k.clone(), v.clone()


def _fuse(layer: Any, wrap: Wrap) -> None:
    """Join q, k, v and gate, up into one projection each: fewer and larger products."""
    attn, mlp = layer.self_attn, layer.mlp
    attn.register_buffer("cached_k", None)
    attn.register_buffer("cached_v", None)
    attn.qkv_proj = wrap(_join(attn, "q_proj", "k_proj", "v_proj"))
    attn.o_proj = wrap(attn.o_proj)
    mlp.gate_up_proj = wrap(_join(mlp, "gate_proj", "up_proj"))
    mlp.down_proj = wrap(mlp.down_proj)


def _join(module: nn.Module, *names: str) -> nn.Linear:
    """Join projections of the same input; they are deleted from the module, so that no weight exists twice."""
    parts: list[nn.Linear] = [getattr(module, name) for name in names]
    weight = torch.cat([part.weight.detach() for part in parts])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=parts[0].bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if joined.bias is not None:
        joined.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]), requires_grad=False)
    for name in names:
        delattr(module, name)
    return joined


def _norm(norm: Qwen3RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary position embedding: x [T, heads, D], cos [T, 1, D], sin [T, 1, D / 2]"""
    first, second = x.chunk(2, dim=-1)
    out = x * cos
    left, right = out.chunk(2, dim=-1)
    left.addcmul_(second, sin, value=-1)
    right.addcmul_(first, sin)
    return out
