"""The Qwen3 decoder on a packed batch: the weights and modules are transformers' own, the way through them is ours.

Why not `model.forward`: only the last token of each document is read, so the last layer computes keys and values for
all tokens but everything else for N tokens instead of T; and norms, rotary embedding and SwiGLU run fused or in place
(in eager transformers they are a third of the time on a CPU). tests/test_scorer.py holds it equal to
`Qwen3ForCausalLM.forward`, one pair at a time. Source of the formulas: transformers' modeling_qwen3.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer, Qwen3Model, Qwen3RMSNorm

from reranker.engine.attention import Attention
from reranker.engine.packing import PackedBatch


def last_hidden(model: Qwen3Model, batch: PackedBatch, kernel: type[Attention]) -> Tensor:
    """Hidden state of each document's last token, before the final norm.

    Args:
        model: the decoder without its head; all weights on the batch's device.
        batch: T tokens, N documents.
        kernel: the attention to use.

    Returns:
        [N, hidden_size] in the model's precision.
    """
    attention = kernel(batch)
    x: Tensor = model.embed_tokens(batch.input_ids)  # [T, hidden]
    cos, sin = model.rotary_emb(x, batch.position_ids[None])
    half = cos.shape[-1] // 2
    cos, sin = cos[0, :, None, :half], sin[0, :, None, :half]  # [T, 1, D / 2]: both halves are equal
    final = len(model.layers) - 1
    for i, layer in enumerate(cast("Iterable[Qwen3DecoderLayer]", model.layers)):
        attn = layer.self_attn
        h = _norm(layer.input_layernorm, x)
        k = _rotate(_norm(attn.k_norm, _heads(attn.k_proj(h), attn.head_dim)), cos, sin)
        v = _heads(attn.v_proj(h), attn.head_dim)
        if i == final:
            x, h, cos, sin = x[batch.last], h[batch.last], cos[batch.last], sin[batch.last]
        q = _rotate(_norm(attn.q_norm, _heads(attn.q_proj(h), attn.head_dim)), cos, sin)
        attend = attention.last if i == final else attention.every
        x = x + attn.o_proj(attend(q, k, v, attn.scaling).flatten(1))
        h = _norm(layer.post_attention_layernorm, x)
        gate = F.silu(layer.mlp.gate_proj(h), inplace=True)
        x = x + layer.mlp.down_proj(gate.mul_(layer.mlp.up_proj(h)))
    return x


def _norm(norm: Qwen3RMSNorm, x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


def _heads(x: Tensor, head_dim: int) -> Tensor:
    """[T, heads * D] -> [T, heads, D]"""
    return x.view(x.shape[0], -1, head_dim)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding: x [T, heads, D], cos and sin [T, 1, D / 2]"""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty_like(x)
    left, right = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=left).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=right).addcmul_(first, sin)
    return out
