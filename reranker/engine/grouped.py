"""Attention of segments of similar lengths in one call each, for a GPU without the varlen kernel.

Shapes as in attention.py; n segments of a call, padded to Q queries and K keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reranker.engine.batch import PackedBatch

MAX_MASK = 1 << 20
"""Numbers of the largest mask: [1024, 1024] floats."""
# Lengths are padded to multiples of it.
_STEP = 64


class _Group(NamedTuple):
    """Segments of one call, n of them, padded to Q queries and K keys."""

    queries: Tensor
    """[n, Q] rows of q"""
    keys: Tensor
    """[n, K] rows of k and v"""
    mask: Tensor | None
    """[Q, K] or [n, 1, 1, K], additive; None: causal, Q = K"""


class GroupedAttention:
    """`scaled_dot_product_attention` group by group, for a GPU without the varlen kernel, where launches take the time.

    Segments of similar lengths are padded at their end, and no query sees the padding of its keys: it comes after the
    query. A segment longer than its shared keys gets queries in front, whose outputs are dropped: the kernel's causal
    mode then needs no mask. What a segment is padded to depends on its own lengths alone, so that a score does not
    depend on the rest of the batch.
    """

    def __init__(self, batch: PackedBatch) -> None:
        device, kv_index = batch.index.device, batch.kv_index
        q, k = torch.tensor(batch.lengths_q), torch.tensor(batch.lengths_k)
        first_q, first_k = q.cumsum(0) - q, k.cumsum(0) - k
        self.all: list[_Group] = []
        outputs, rows = torch.empty(batch.tokens, dtype=torch.int64), 0  # of each token, among the groups' outputs
        for (shared, size), segments in _grouped(batch).items():
            group = torch.tensor(segments)
            lead = k[group] - q[group] if shared is None else torch.zeros_like(group)
            places = torch.arange(size) - lead[:, None]
            queries = first_q[group][:, None] + _nearest(places, q[group])
            own = (places >= 0) & (places < q[group][:, None])
            outputs[queries[own]] = rows + own.flatten().nonzero()[:, 0]
            rows += own.numel()
            keys = first_k[group][:, None] + _nearest(torch.arange(size + (shared or 0)), k[group])
            mask = None if shared is None else shifted_causal(size, shared, device)
            self.all.append(_Group(queries.to(device), kv_index[keys.to(device)], mask))
        self.all_outputs = outputs.to(device)

        self.last: list[_Group] = []
        sizes: dict[int, list[int]] = {}
        for document, length in enumerate(batch.lengths_k[batch.prefixes :]):
            sizes.setdefault(_rounded(length), []).append(document)
        for size, documents in sizes.items():
            lengths, first = (x[batch.prefixes :][documents][:, None] for x in (k, first_k))
            keys = first + _nearest(torch.arange(size), lengths[:, 0])
            mask = torch.zeros(keys.shape).masked_fill_(torch.arange(size) >= lengths, float("-inf"))[:, None, None]
            queries = torch.tensor(documents)[:, None]
            self.last.append(_Group(queries.to(device), kv_index[keys.to(device)], mask.to(device)))
        order = torch.tensor([document for documents in sizes.values() for document in documents])
        self.last_outputs = order.argsort().to(device)

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_all`."""
        return torch.cat([_attend(group, q, k, v, scale) for group in self.all])[self.all_outputs]

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_last`."""
        return torch.cat([_attend(group, q, k, v, scale) for group in self.last])[self.last_outputs]


def _grouped(batch: PackedBatch) -> dict[tuple[int | None, int], list[int]]:
    """Return the segments of each call by (shared keys, Q) of those with a mask, and (None, Q) of the causal ones."""
    groups: dict[tuple[int | None, int], list[int]] = {}
    for segment, (queries, keys) in enumerate(zip(batch.lengths_q, batch.lengths_k, strict=True)):
        shared, size = keys - queries, _rounded(queries)
        masked = queries < shared and size * (shared + size) <= MAX_MASK
        groups.setdefault((shared, size) if masked else (None, _rounded(keys)), []).append(segment)
    return groups


def _rounded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _nearest(places: Tensor, lengths: Tensor) -> Tensor:
    """places [S] or [n, S], lengths [n] -> [n, S]: each place, or the first or last one of its segment"""
    return places.clamp(min=0).minimum(lengths[:, None] - 1)


def _attend(group: _Group, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [rows, H, D], k and v [P + T, G, D] -> [n * Q, H, D]"""
    repeats = q.shape[1] // k.shape[1]  # unequal head counts would leave only the math kernel: its memory is quadratic
    keys, values = (x[group.keys].repeat_interleave(repeats, 2).transpose(1, 2) for x in (k, v))
    attended = F.scaled_dot_product_attention(
        q[group.queries].transpose(1, 2),
        keys,
        values,
        attn_mask=None if group.mask is None else group.mask.to(q.dtype),
        is_causal=group.mask is None,
        scale=scale,
    )
    return attended.transpose(1, 2).flatten(0, 1)


def shifted_causal(queries: int, shared: int, device: torch.device) -> Tensor:
    """[queries, shared + queries] additive mask: query i sees keys 0 to shared + i"""
    hidden = torch.ones(queries, shared + queries, dtype=torch.bool, device=device).triu(shared + 1)
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))
