"""The decoder of Qwen3 and Qwen2 on a packed batch, loaded a layer at a time.

The modules are transformers' own; the forward pass is not. Only the last token of each document is read, so the last
layer computes queries, keys and values for T tokens and everything else for N; projections of the same input are one
matrix; norms, rotary embedding and SwiGLU run fused or in place (in eager transformers they take a third of the time on
a CPU), there in blocks of tokens. tests/engine/test_scorer.py compares it with `Qwen3ForCausalLM.forward`, one pair at
a time, and tests/engine/test_decoder.py with `Qwen2ForCausalLM.forward`. Source of the formulas: transformers'
modeling_qwen3.py and modeling_qwen2.py.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig

from reranker.engine.attention import Attention
from reranker.engine.batch import PackedBatch, pack
from reranker.engine.checkpoint.files import ORIGINAL, refuse_if
from reranker.engine.checkpoint.weights import EMBEDDING
from reranker.engine.families.base import Backbone, LayerFns, Widths
from reranker.engine.families.loader import Loader, refuse_unread
from reranker.engine.linear import cat, in_blocks, row_blocks
from reranker.types import EncodedRequest, Slice


def before_attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `LayerFns.before`; cos [T, 1, D], sin [T, 1, D / 2]; `layer` is a decoder layer with joined projections."""
    attn = layer.self_attn
    q, k, v = zip(*(_project(layer, *block) for block in row_blocks(x, cos, sin)), strict=True)
    if attn.cached_k is None:
        return cat(*q), cat(*k), cat(*v)
    return cat(*q), cat(attn.cached_k, *k), cat(attn.cached_v, *v)


def after_attention(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """See `LayerFns.after`."""
    return in_blocks(partial(_feed_forward, layer), x, attended)


def widths(config: PretrainedConfig) -> Widths:
    """Return the numbers per token of the decoder that config.json describes."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    hidden, intermediate = config.hidden_size, config.intermediate_size
    before = 4 * hidden + 2 * intermediate + 2 * (heads + 4 * groups) * head
    after = 4 * hidden + 3 * intermediate + 2 * (heads + groups + 2) * head  # q, k, v are still held beside gate and up
    return Widths(max(before, after), config.num_hidden_layers * 2 * groups * head)


class Decoder(Backbone):
    """A decoder with causal attention in every layer; see `Family.backbone`.

    Qwen3 has norms of queries and keys, Qwen2 has biases of queries, keys and values instead; transformers' module for
    the model_type decides. Embeddings stay as they are stored, unless they are wider than `compute_dtype`: each row is
    cast when it is read.

    Raises:
        ModelLoadError: config.json has layers with sliding attention, or transformers a module with other parameters.
    """

    causal = True
    eager = LayerFns(before_attention, after_attention)

    def __init__(self, loader: Loader, config: PretrainedConfig) -> None:
        weights = loader.weights
        sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
        problem = f"{weights.path / 'config.json'} has layers with sliding attention (layer_types)"
        refuse_if(sliding, f"{problem}, which is not computed: {ORIGINAL}")
        config = copy.deepcopy(config)  # transformers writes the dtype into it
        with torch.device("meta"):
            decoder = AutoModel.from_config(config, attn_implementation="sdpa", dtype=loader.compute_dtype).eval()
        self.decoder: Any = decoder
        self.layers: list[Any] = list(decoder.layers)
        self.vocab_size: int = config.vocab_size
        self.activation_width = widths(config).activation
        self.head_dim: int = decoder.layers[0].self_attn.head_dim
        decoder.rotary_emb = type(decoder.rotary_emb)(config).to(loader.device)  # its buffers are not stored
        rows = weights.tensor(EMBEDDING)
        dtype = min(rows.dtype, loader.compute_dtype, key=lambda dtype: dtype.itemsize)
        decoder.embed_tokens.weight = loader.parameter(dtype, rows)
        del rows
        for i, layer in enumerate(self.layers):
            _load(loader, layer, f"model.layers.{i}")
        loader.norm(decoder.norm, "model.norm")
        _refuse_unread(decoder)

    def hidden(self, batch: PackedBatch, kernel: type[Attention], layer_fns: LayerFns) -> Tensor:
        """See `Backbone.hidden`."""
        decoder, attention, layers = self.decoder, kernel(batch), self.layers
        norm = decoder.norm
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
        for layer, (k, v) in zip(self.layers, computed, strict=True):  # clones made here are no inference tensors
            layer.self_attn.cached_k, layer.self_attn.cached_v = k.clone(), v.clone()


def _load(loader: Loader, layer: Any, name: str) -> None:
    """Load a layer with q, k, v and gate, up as one projection each: fewer and larger products."""
    attn, mlp = layer.self_attn, layer.mlp
    attn.register_buffer("cached_k", None)
    attn.register_buffer("cached_v", None)
    attn.qkv_proj = loader.projection(attn, f"{name}.self_attn", "q_proj", "k_proj", "v_proj")
    attn.o_proj = loader.projection(attn, f"{name}.self_attn", "o_proj")
    mlp.gate_up_proj = loader.projection(mlp, f"{name}.mlp", "gate_proj", "up_proj")
    mlp.down_proj = loader.projection(mlp, f"{name}.mlp", "down_proj")
    for norm in ("q_norm", "k_norm"):
        if hasattr(attn, norm):
            loader.norm(getattr(attn, norm), f"{name}.self_attn.{norm}")
        else:
            attn.register_module(norm, None)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        loader.norm(getattr(layer, norm), f"{name}.{norm}")


def _refuse_unread(decoder: nn.Module) -> None:
    """Refuse a module of transformers with a parameter that the pass above does not compute."""
    tensors = (*decoder.named_parameters(), *decoder.named_buffers())
    refuse_unread(decoder, (name for name, tensor in tensors if tensor.is_meta))


def _project(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the queries, keys and values of some tokens."""
    attn = layer.self_attn
    heads = attn.qkv_proj(_norm(layer.input_layernorm, x)).unflatten(-1, (-1, attn.head_dim))
    groups = attn.config.num_key_value_heads
    q, k, v = heads.split([attn.config.num_attention_heads, groups, groups], dim=1)
    if attn.q_norm is not None:
        q, k = _norm(attn.q_norm, q), _norm(attn.k_norm, k)
    return _rotate(q, cos, sin), _rotate(k, cos, sin), v


def _feed_forward(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """Return the output of a layer for some tokens."""
    x = x + layer.self_attn.o_proj(attended.flatten(1))
    gate, up = layer.mlp.gate_up_proj(_norm(layer.post_attention_layernorm, x)).chunk(2, dim=-1)
    out: Tensor = x + layer.mlp.down_proj(F.silu(gate).mul_(up))
    return out


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary position embedding: x [T, heads, D], cos [T, 1, D], sin [T, 1, D / 2]"""
    first, second = x.chunk(2, dim=-1)
    out = x * cos
    left, right = out.chunk(2, dim=-1)
    left.addcmul_(second, sin, value=-1)
    right.addcmul_(first, sin)
    return out
