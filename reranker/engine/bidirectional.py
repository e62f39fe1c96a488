"""Bidirectional attention over a packed batch of pairs: each token sees its whole pair, or a window around itself.

Pairs share no prefix, so the keys are the batch's tokens. Shapes as in attention.py, with P = 0 and K = T.
"""

from __future__ import annotations

import inspect
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reranker.engine.attention import (
    Attention,
    SdpaAttention,
    VarlenAttention,
    choose_kernel,
    varlen_attn,
    varlen_options,
)
from reranker.engine.batch import PackedBatch

_OPTIONS = None if varlen_attn is None else varlen_options(inspect.signature(varlen_attn).parameters)
# Lengths are padded to multiples of it: by 8 tokens on average, and few calls.
_STEP = 16
_FEW = 32
"""Queries of a block of SdpaPairs, at least: as many rows as its kernel multiplies at a time."""
_BLOCK = 128
"""Queries of a call with a window, which sees as many keys and the window on both sides."""


class PairAttention(Attention, Protocol):
    """Attention of one batch of pairs; `attend_last` is that of each pair's one scored token, without a window."""

    def __init__(self, batch: PackedBatch, window: int | None = None) -> None:
        """`window`: a token sees those at most so far away; None: its whole pair."""


def choose_pair_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[type[PairAttention], str]:
    """See `choose_kernel`."""
    kernel, reason = choose_kernel(device, dtype, head_dim)
    if kernel is VarlenAttention:
        return VarlenPairs, reason
    if kernel is SdpaAttention:
        return SdpaPairs, f"scaled_dot_product_attention per pair {reason[reason.find('(') :]}"
    return GroupedPairs, f"scaled_dot_product_attention per group of lengths {reason[reason.find('(') :]}"


class _Block(NamedTuple):
    """Queries of a pair and the keys that they see, as rows of q and of k and v."""

    start: int
    stop: int
    first_key: int
    last_key: int
    """One more than the last."""
    masked: int | None
    """The place of the first key in the mask; None: every query sees every key."""


class SdpaPairs:
    """`scaled_dot_product_attention` pair by pair, and with a window block by block of its queries: for a CPU.

    Each call reads the packed tokens in place. Calls for several pairs would be fewer, but gathering and padding their
    tokens takes longer than that saves, at 16 tokens a pair as at 400.
    """

    def __init__(self, batch: PackedBatch, window: int | None = None) -> None:
        self.pairs: list[tuple[int, int]] = []
        """First row of each pair, and one more than its last."""
        self.blocks: list[_Block] = []
        size, start = 0 if window is None else max(_FEW, window), 0
        for length in batch.lengths_q[batch.prefixes :]:
            stop = start + length
            self.pairs.append((start, stop))
            if window is None or length <= window + 1:
                self.blocks.append(_Block(start, stop, start, stop, None))
            else:
                for first in range(start, stop, size):
                    end, low = min(first + size, stop), max(first - window, start)
                    self.blocks.append(_Block(first, end, low, min(end + window, stop), low - first + window))
            start = stop
        rows, columns = torch.arange(size)[:, None], torch.arange(size + 2 * (window or 0))
        near = (columns - (window or 0) - rows).abs() <= (window or 0)
        self.mask = _additive(near).to(batch.index.device)
        """[size, size + 2 * window], additive: of the queries of a block, and the keys around it."""

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_all`."""
        out = torch.empty_like(q)
        queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))  # [1, H, T, D]
        self.mask = self.mask.to(q.dtype)
        for start, stop, first, last, masked in self.blocks:
            mask = None if masked is None else self.mask[: stop - start, masked : masked + last - first]
            attended = F.scaled_dot_product_attention(
                queries[:, :, start:stop],
                keys[:, :, first:last],
                values[:, :, first:last],
                attn_mask=mask,
                scale=scale,
            )
            out[start:stop] = attended[0].transpose(0, 1)
        return out

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_last`."""
        out = torch.empty_like(q)
        keys, values = (x.transpose(0, 1)[None] for x in (k, v))
        for i, (start, stop) in enumerate(self.pairs):
            query = q[i, None, :, None]
            attended = F.scaled_dot_product_attention(
                query, keys[:, :, start:stop], values[:, :, start:stop], scale=scale
            )
            out[i] = attended[0, :, 0]
        return out


class _Call(NamedTuple):
    """Segments or blocks of one call, n of them, padded to Q queries and K keys."""

    queries: Tensor
    """[n, Q] rows of q"""
    keys: Tensor
    """[n, K] rows of k and v"""
    mask: Tensor | None
    """[n, 1, 1 or Q, K], additive; None: nothing is padded"""


class GroupedPairs:
    """`scaled_dot_product_attention` for pairs of similar lengths in one call each; long ones with a window in blocks.

    For a GPU without the varlen kernel, where launches take the time.
    Padding is masked. The length to which a pair is padded depends on its own length alone, so that its score does not
    depend on the rest of the batch.
    """

    def __init__(self, batch: PackedBatch, window: int | None = None) -> None:
        lengths = torch.tensor(batch.lengths_q[batch.prefixes :])
        starts = lengths.cumsum(0) - lengths
        device = batch.index.device
        whole: dict[int, list[int]] = {}
        blocks: list[tuple[int, int]] = []
        """(pair, first query)"""
        for pair, length in enumerate(batch.lengths_q[batch.prefixes :]):
            if window is None or length <= _BLOCK + 2 * window:  # no more work than in blocks
                whole.setdefault(-(-length // _STEP) * _STEP, []).append(pair)
            else:
                blocks += [(pair, first) for first in range(0, length, _BLOCK)]
        self.all: list[_Call] = []
        self.last: list[_Call] = []
        outputs, rows = torch.empty(batch.tokens, dtype=torch.int64), 0  # of each token, among those of the calls
        for size, pairs in whole.items():
            n, first, places = lengths[pairs][:, None], starts[pairs][:, None], torch.arange(size)
            keys = first + places.minimum(n - 1)
            own = places < n
            outputs[keys[own]] = rows + own.flatten().nonzero()[:, 0]
            rows += own.numel()
            seen = own[:, None, None]
            if window is not None:
                seen = seen & ((places[:, None] - places).abs() <= window)
            mask = None if seen.all() else _additive(seen).to(device)
            self.all.append(_Call(keys.to(device), keys.to(device), mask))
            self.last.append(_Call(torch.tensor(pairs)[:, None].to(device), keys.to(device), mask))
        if blocks and window is not None:
            pairs, firsts = (list(column) for column in zip(*blocks, strict=True))
            n, start, first = lengths[pairs][:, None], starts[pairs][:, None], torch.tensor(firsts)[:, None]
            q, k = first + torch.arange(_BLOCK), first + torch.arange(-window, _BLOCK + window)
            inside, own = (k >= 0) & (k < n), q < n
            queries = start + q.minimum(n - 1)
            outputs[queries[own]] = rows + own.flatten().nonzero()[:, 0]
            near = (q[:, :, None] - k[:, None]).abs() <= window
            mask = _additive(inside[:, None] & near)[:, None].to(device)
            self.all.append(_Call(queries.to(device), (start + k.clamp(min=0).minimum(n - 1)).to(device), mask))
        self.outputs = outputs.to(device)
        self.last_outputs = torch.tensor([pair for pairs in whole.values() for pair in pairs]).argsort().to(device)

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_all`."""
        return torch.cat([_attend(call, q, k, v, scale) for call in self.all])[self.outputs]

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_last`."""
        return torch.cat([_attend(call, q, k, v, scale) for call in self.last])[self.last_outputs]


def _additive(seen: Tensor) -> Tensor:
    return torch.zeros(seen.shape).masked_fill_(~seen, float("-inf"))


def _attend(call: _Call, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [rows, H, D], k and v [T, H, D] -> [n * Q, H, D]"""
    attended = F.scaled_dot_product_attention(
        q[call.queries].transpose(1, 2),
        k[call.keys].transpose(1, 2),
        v[call.keys].transpose(1, 2),
        attn_mask=None if call.mask is None else call.mask.to(q.dtype),
        scale=scale,
    )
    return attended.transpose(1, 2).flatten(0, 1)


class VarlenPairs(VarlenAttention):
    """One `varlen_attn` call for the whole batch; see VarlenAttention."""

    def __init__(self, batch: PackedBatch, window: int | None = None) -> None:
        super().__init__(batch)
        assert _OPTIONS is not None  # choose_kernel
        self.options = _OPTIONS | {"window_size": (-1, -1) if window is None else (window, window)}

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, max_q: int, scale: float) -> Tensor:
        out = varlen_attn(q, k, v, cu_q, self.cu_q, max_q, self.max_q, scale=scale, **self.options)
        assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
        return out
