"""The demo model: a small `Qwen3ForCausalLM` whose initial weights already match equal words, and its training pass.

From a random start, a model of this size learns nothing about relevance for a long time: it first has to discover that
document tokens should attend to equal tokens of the query. The initial weights therefore do that, and all are trained
afterwards:

- Embeddings of tokens with the same letters, stem or Chinese characters start close together.
- One head of layer 0 attends to the last of the prompt's words "<Query" and "<Document", and writes the token's part of
  the prompt to a separate channel.
- The heads of layer 1 have equal query and key projections, so that equal tokens attend to each other. A document token
  attends to itself and to equal tokens in the query; whether there is one is written to a third channel.
"""

import math
import re

import torch
from batches import Batch
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, Qwen3Config, Qwen3ForCausalLM

WIDTH, HEADS, KV_HEADS, HEAD = 192, 4, 2, 64
SECTION_LAYER, MATCH_LAYER = 0, 1
CONSTANT, IS_QUERY, IS_DOCUMENT, IN_QUERY, MATCHED = range(5)
"""Channels of the residual stream that the initial weights use."""

SLOW = 16
"""Rotary position embedding rotates a head's dimensions i and i + 32 by theta^(-i/32) per token: from this i on slowly
enough to compare contents over some hundred tokens."""


def new_model(tokenizer: Tokenizer) -> Qwen3ForCausalLM:
    """Return the untrained model."""
    config = Qwen3Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id("<|endoftext|>"),
        eos_token_id=tokenizer.token_to_id("<|im_end|>"),
        attn_implementation="shared_prefix",
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, nn.Linear)):
                linear.weight.normal_(std=linear.in_features**-0.5)
            layer.self_attn.o_proj.weight.mul_(0.3)
            layer.mlp.down_proj.weight.mul_(0.3)
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight[: MATCHED + 1] = 0.0
        model.model.embed_tokens.weight.copy_(word_like_embeddings(tokenizer))
        model.model.norm.weight.fill_(0.1)
        wire_sections(model.model.layers[SECTION_LAYER].self_attn)
        wire_matching(model.model.layers[MATCH_LAYER].self_attn)
    return model


def word_like_embeddings(tokenizer: Tokenizer) -> torch.Tensor:
    """Return random rows [V, WIDTH], similar for tokens with the same letters, stem or Chinese characters."""
    features: dict[str, int] = {}
    rows = []
    for token in range(tokenizer.get_vocab_size()):
        text = tokenizer.decode([token], skip_special_tokens=False)
        word = text.strip().lower()
        parts = {f"token {token}": 0.35}
        if re.search(r"\w", word) and "\ufffd" not in word:
            parts[f"word {word}"] = 1.0
            if word.isascii():
                parts |= {f"start {word[:n]}": w for n, w in ((4, 0.5), (6, 0.5)) if len(word) >= n}
            else:
                parts |= {f"character {c}": 1.2 / math.sqrt(len(word)) for c in word}
        rows.append([(features.setdefault(name, len(features)), weight) for name, weight in parts.items()])
    basis = torch.randn(len(features), WIDTH)
    table = torch.stack([sum((basis[f] * w for f, w in row), torch.zeros(WIDTH)) for row in rows])
    table = 0.5 * F.rms_norm(table, (WIDTH,))
    table[:, : MATCHED + 1] = 0.0
    table[:, CONSTANT] = 1.0
    table[tokenizer.token_to_id("<Query"), IS_QUERY] = 2.0
    table[tokenizer.token_to_id("<Document"), IS_DOCUMENT] = 2.0
    return table


def wire_sections(attention: nn.Module) -> None:
    """Head 0: every token attends to "<Document" or else to "<Query"; in the latter case it is in the query."""
    q, k, v = (getattr(attention, f"{name}_proj").weight.view(-1, HEAD, WIDTH)[0] for name in "qkv")
    direction = torch.zeros(HEAD)
    direction[HEAD // 2 - 8 : HEAD // 2] = 1.0  # the slowest dimensions
    q.mul_(0.05)[:, CONSTANT] = 2 * direction
    k[:, CONSTANT] = 0.0
    k[:, IS_QUERY] = 0.8 * direction
    k[:, IS_DOCUMENT] = 3 * direction
    v[0] = 0.0
    v[0, IS_QUERY] = 1.0
    attention.o_proj.weight[IN_QUERY, 0] = 0.5
    attention.q_norm.weight.fill_(1.3)
    attention.k_norm.weight.fill_(1.3)


def wire_matching(attention: nn.Module) -> None:
    """All heads: equal words attend to each other; matches in the query are summed in one channel."""
    slow = (torch.arange(HEAD) % (HEAD // 2) >= SLOW).float()
    k = attention.k_proj.weight.view(KV_HEADS, HEAD, WIDTH)
    k.mul_(slow[:, None])[:, :, : MATCHED + 1] = 0.0
    repeat = HEADS // KV_HEADS
    attention.q_proj.weight.copy_(k.repeat_interleave(repeat, 0).reshape(HEADS * HEAD, WIDTH))
    v = attention.v_proj.weight.view(KV_HEADS, HEAD, WIDTH)
    v[:, 0] = 0.0
    v[:, 0, IN_QUERY] = 1.0
    attention.o_proj.weight.view(WIDTH, HEADS, HEAD)[MATCHED, :, 0] = 1.0 / HEADS
    attention.q_norm.weight.fill_(1.6)
    attention.k_norm.weight.fill_(1.6)


def shared_prefix_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: None,
    *,
    shape: tuple[int, int],
    documents: tuple[int, int],
    bias: torch.Tensor,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attend within prefixes, and from documents to their group's prefix and themselves.

    Heads are [1, H, T, C] with T = G*P + G*N*D; `shape` is (G, P), `documents` (N, D), `bias` [G*N, 1, D, P + D].
    """
    groups, width = shape
    size, depth = documents
    boundary = groups * width
    heads = query.shape[1]

    def split(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return prefixes [G, H, P, C] and documents [G*N, H, D, C]."""
        x = x[0].repeat_interleave(heads // x.shape[1], 0).transpose(0, 1)
        prefix, document = x[:boundary].unflatten(0, (groups, width)), x[boundary:].unflatten(0, (groups * size, depth))
        return prefix.transpose(1, 2), document.transpose(1, 2)

    (qp, qd), (kp, kd), (vp, vd) = split(query), split(key), split(value)
    prefix = F.scaled_dot_product_attention(qp, kp, vp, is_causal=True, scale=scaling)
    k = torch.cat([kp.repeat_interleave(size, 0), kd], 2)
    v = torch.cat([vp.repeat_interleave(size, 0), vd], 2)
    document = F.scaled_dot_product_attention(qd, k, v, attn_mask=bias, scale=scaling)
    out = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (prefix, document)])
    return out[None], None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


def forward(model: Qwen3ForCausalLM, batch: Batch) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the documents' hidden states after every layer, each [G*N, D, C], and their last positions [G*N]."""
    groups, width = batch.prefix.shape
    count, depth = batch.document.shape
    size = count // groups
    starts = batch.prefix_length.repeat_interleave(size)
    positions = torch.cat([torch.arange(width).repeat(groups), (starts[:, None] + torch.arange(depth)).flatten()])
    seen = torch.arange(width) < starts[:, None]
    causal = torch.ones(depth, depth, dtype=torch.bool).tril()
    allowed = torch.cat([seen[:, None].expand(-1, depth, -1), causal.expand(count, -1, -1)], 2)
    bias = torch.zeros(allowed.shape).masked_fill_(~allowed, -1e9)[:, None]
    output = model.model(
        input_ids=torch.cat([batch.prefix.flatten(), batch.document.flatten()])[None],
        position_ids=positions[None],
        output_hidden_states=True,
        use_cache=False,
        shape=(groups, width),
        documents=(size, depth),
        bias=bias,
    )
    states = tuple(h[0, groups * width :].view(count, depth, -1) for h in output.hidden_states)
    return states, batch.document_length - 1


def answer(model: Qwen3ForCausalLM, state: torch.Tensor, yes: int, no: int) -> torch.Tensor:
    """Return the logit of "yes" minus the logit of "no" for states [M, C]."""
    rows = model.model.embed_tokens.weight
    return state @ (rows[yes] - rows[no])
