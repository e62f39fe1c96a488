"""The Qwen3 decoder on a packed batch: the weights and modules are transformers' own, the way through them is ours.

Why not `model.forward`: only the last token of each document is read, so the last layer computes queries, keys and
values for all tokens but everything else for N tokens instead of T; projections that read the same input are one
matrix; and norms, rotary embedding and SwiGLU run fused or in place (in eager transformers they are a third of the time
on a CPU). tests/engine/test_scorer.py holds it equal to `Qwen3ForCausalLM.forward`, one pair at a time. Source of the
formulas: transformers' modeling_qwen3.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm

from reranker.engine.attention import Attention
from reranker.engine.batch import PackedBatch, pack
from reranker.types import EncodedRequest, Slice


def before_attention(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, hidden] -> q [T, H, D], k and v [P + T, G, D]; `layer` is a fused Qwen3DecoderLayer."""
    attn = layer.self_attn
    heads = attn.qkv_proj(_norm(layer.input_layernorm, x)).unflatten(-1, (-1, attn.head_dim))
    groups = attn.config.num_key_value_heads
    q, k, v = heads.split([attn.config.num_attention_heads, groups, groups], dim=1)
    q, k = _rotate(_norm(attn.q_norm, q), cos, sin), _rotate(_norm(attn.k_norm, k), cos, sin)
    if attn.kept_k is None:
        return q, k, v
    return q, torch.cat([attn.kept_k, k]), torch.cat([attn.kept_v, v])


def after_attention(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """x [T, hidden], attended [T, H, D] -> [T, hidden]"""
    x = x + layer.self_attn.o_proj(attended.flatten(1))
    gate, up = layer.mlp.gate_up_proj(_norm(layer.post_attention_layernorm, x)).chunk(2, dim=-1)
    out: Tensor = x + layer.mlp.down_proj(F.silu(gate).mul_(up))
    return out


class LayerFns(NamedTuple):
    """The two halves of a layer, around its attention."""

    before: Callable[[Any, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] = before_attention
    after: Callable[[Any, Tensor, Tensor], Tensor] = after_attention


PLAIN = LayerFns()


def last_hidden(model: Qwen3Model, batch: PackedBatch, kernel: type[Attention], stages: LayerFns = PLAIN) -> Tensor:
    """Hidden state of each document's last token, before the final norm.

    Args:
        model: the fused decoder without its head; all weights on the batch's device.
        batch: T tokens, N documents.
        kernel: the attention to use.
        stages: what to run before and after it; the last layer's N tokens always go the plain way.

    Returns:
        [N, hidden_size] in the precision that the norms have.
    """
    attention = kernel(batch)
    x: Tensor = model.embed_tokens(batch.input_ids).to(model.norm.weight.dtype)  # [T, hidden]
    cos, sin = model.rotary_emb(x, batch.position_ids[None])
    cos, sin = (
        cos[0, :, None],
        sin[0, :, None, : sin.shape[-1] // 2],
    )  # [T, 1, D], [T, 1, D / 2]: both halves are equal
    layers = list(cast("Iterable[Any]", model.layers))
    for layer in layers[:-1]:
        q, k, v = stages.before(layer, x, cos, sin)
        x = stages.after(layer, x, attention.every(q, k, v, layer.self_attn.scaling))
    q, k, v = stages.before(layers[-1], x, cos, sin)
    attended = attention.last(q[batch.last], k, v, layers[-1].self_attn.scaling)
    return after_attention(layers[-1], x[batch.last], attended)


def keep(model: Qwen3Model, tokens: list[int], kernel: type[Attention]) -> None:
    """Compute the keys and values of what every prompt begins with, and keep them in each layer: [P, G, D].

    From then on batches are packed with `static_prefix=len(tokens)`.
    """
    batch = pack([Slice(EncodedRequest(tokens, [tokens[-1:]]), 0, 1)]).to(model.norm.weight.device)
    found: list[tuple[Any, Tensor, Tensor]] = []

    def before(layer: Any, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = before_attention(layer, x, cos, sin)
        found.append((layer.self_attn, k[: len(tokens)], v[: len(tokens)]))
        return q, k, v

    with torch.inference_mode():
        last_hidden(model, batch, kernel, LayerFns(before))
    for attn, k, v in found:
        attn.kept_k, attn.kept_v = k.clone(), v.clone()


def fuse(model: Qwen3Model, wrap: Callable[[nn.Linear], nn.Module] = lambda linear: linear) -> None:
    """Join q, k, v and gate, up into one projection each, in place, a layer at a time; fewer and larger products.

    `wrap` makes what takes a projection's place: a quantised one, say.
    """
    for layer in cast("Iterable[Any]", model.layers):
        attn, mlp = layer.self_attn, layer.mlp
        attn.register_buffer("kept_k", None)
        attn.register_buffer("kept_v", None)
        attn.qkv_proj = wrap(_join(attn, "q_proj", "k_proj", "v_proj"))
        attn.o_proj = wrap(attn.o_proj)
        mlp.gate_up_proj = wrap(_join(mlp, "gate_proj", "up_proj"))
        mlp.down_proj = wrap(mlp.down_proj)


def _join(module: nn.Module, *names: str) -> nn.Linear:
    """Projections of the same input as one; they leave the module, so that no weight is there twice."""
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
    """Rotary position embedding: x [T, heads, D], cos [T, 1, D], sin [T, 1, D / 2]"""
    first, second = x.chunk(2, dim=-1)
    out = x * cos
    left, right = out.chunk(2, dim=-1)
    left.addcmul_(second, sin, value=-1)
    right.addcmul_(first, sin)
    return out
