"""Attention over a packed batch: one interface, three kernels; tests/engine/test_attention.py compares them.

An attention object is created once per batch and called once per layer. Shapes: H query heads, G key/value heads, D
head dimension; T tokens, N documents, P cached keys of the static prefix, K gathered keys (see batch.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reranker.engine.batch import PackedBatch
from reranker.engine.grouped import GroupedAttention, shifted_causal

try:
    from torch.nn.attention.varlen import varlen_attn as varlen_attn
except ImportError:  # this torch has no varlen kernel
    varlen_attn = None  # type: ignore[assignment]


def varlen_options(parameters: Collection[str]) -> dict[str, Any] | None:
    """Return a varlen_attn's options for "causal, aligned to the end of the keys, fewer key than query heads".

    torch 2.11 has `window_size` and takes unequal head counts; 2.12 and newer also have `enable_gqa` and `num_splits`:
    1 makes a document's result independent of its neighbours' lengths. None: an older torch, which has no `scale`.
    """
    if not {"window_size", "scale"} <= {*parameters}:
        return None
    optional = {"enable_gqa": True, "num_splits": 1}
    return {"window_size": (-1, 0)} | {name: value for name, value in optional.items() if name in parameters}


_OPTIONS = None if varlen_attn is None else varlen_options(inspect.signature(varlen_attn).parameters)
# Queries of a segment in the last layer: 1 for a document, at most 64 for the padding of a recorded batch (graphs.py).
MAX_LAST_QUERIES = 64
_BLOCK = 32
"""Queries of a call for each thread: those the CPU kernel multiplies at a time (torch: FlashAttentionKernel.cpp)."""
MAX_MASKED_KEYS = 1024
"""Limit for masks on a CPU. In a longer segment that is mostly its own, the kernel's causal mode skips about as much
work and reads no mask."""


class Attention(Protocol):
    """Attention of one batch: for every token, or for the last token of each document."""

    def __init__(self, batch: PackedBatch) -> None: ...

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, H, D], k and v [P + T, G, D] -> [T, H, D]"""

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [N, H, D] of the documents' last tokens, k and v [P + T, G, D] -> [N, H, D]"""


def choose_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[type[Attention], str]:
    """Return the kernel for a device, a precision and a head dimension, and the reason, for the log."""
    if device.type != "cuda":
        missing = "no varlen kernel on this device"
    elif _OPTIONS is None:
        missing = "this torch is older than 2.11, and has no varlen_attn with these options"
    elif dtype not in (torch.bfloat16, torch.float16):
        missing = "the varlen kernel takes 16-bit types only"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        missing = "the varlen kernel needs compute capability 8.0"
    elif head_dim % 8:
        missing = f"the varlen kernel takes head dimensions in multiples of 8, not {head_dim}"
    else:
        return VarlenAttention, "varlen_attn (one call per layer)"
    if device.type == "cuda":
        return GroupedAttention, f"scaled_dot_product_attention per group of lengths ({missing})"
    return SdpaAttention, f"scaled_dot_product_attention per block of queries ({missing})"


class _Segment(NamedTuple):
    """A prefix or a document, and how its queries are divided into calls."""

    rows: Tensor
    """[keys - kept] rows of k and v"""
    kept: int
    """Keys at the start that are those of the segment before it."""
    keys: int
    masked: bool
    """Whether its calls have a mask; otherwise one call is causal, with padding in front of the queries."""
    blocks: list[tuple[int, int, int]]
    """Of each call: first query, last query + 1, keys that the last query sees"""


class SdpaAttention:
    """`scaled_dot_product_attention` block by block of a segment's queries: for a CPU.

    torch's kernel computes all weights of a call up to 512 keys, also those that a mask hides. A block of few queries
    is called with the keys that its last query sees, so that few are hidden, and the kernel multiplies as many rows at
    a time as in a longer call. Documents share no call, because padding and copying their queries takes longer than the
    calls.

    Keys and values are copied to one buffer of the longest segment, where those of a prefix stay for all documents of
    its request: a copy of the whole batch would be new memory in every layer, whose page faults take longer than the
    copy.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self.first_document = batch.prefixes
        self.longest = batch.shape.longest_k
        self.buffers: list[Tensor] = []
        """Keys and values of a segment: [longest, G, D] each, allocated by the first call"""
        size = _BLOCK * torch.get_num_threads()  # a call is divided among them
        firsts = {*range(batch.prefixes), *accumulate((s.stop - s.start for s in batch.slices), initial=batch.prefixes)}
        self.segments: list[_Segment] = []
        self.shared = start = key = rows = 0
        for i, (queries, keys) in enumerate(zip(batch.lengths_q, batch.lengths_k, strict=True)):
            shared = keys - queries
            masked = keys <= MAX_MASKED_KEYS or queries < shared
            count = max(1, -(-queries // size)) if masked else 1
            bounds = [queries * j // count for j in range(count + 1)]
            blocks = [(start + first, start + last, shared + last) for first, last in pairwise(bounds)]
            if masked:
                self.shared = max(self.shared, shared + bounds[-2])
                rows = max(rows, min(queries, size))
            kept = 0 if i in firsts else shared
            self.segments.append(_Segment(batch.kv_index[key + kept : key + keys], kept, keys, masked, blocks))
            start, key = start + queries, key + keys
        self.mask = shifted_causal(rows, self.shared, batch.index.device)
        """Of every block: its last columns, and those of the keys before the block"""

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_all`."""
        heads, out = q.transpose(0, 1)[None], torch.empty_like(q)
        self.mask = self.mask.to(q.dtype)
        for segment, keys, values in self._gather(self.segments, k, v):
            for start, stop, seen in segment.blocks:
                queries, mask, lead = heads[:, :, start:stop], None, 0
                if segment.masked:
                    after = self.shared + stop - start
                    mask = self.mask[: stop - start, after - seen : after]
                else:
                    lead = seen - (stop - start)  # the causal diagonal starts at the first key
                    queries = F.pad(queries, (0, 0, lead, 0))
                attended = F.scaled_dot_product_attention(
                    queries,
                    keys[:, :, :seen],
                    values[:, :, :seen],
                    attn_mask=mask,
                    is_causal=mask is None,
                    scale=scale,
                    enable_gqa=True,
                )
                out[start:stop] = attended[0, :, lead:].transpose(0, 1)
        return out

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_last`."""
        # Heads of the same keys become queries of one head: fewer, larger products.
        heads = q.unflatten(1, (k.shape[1], -1))
        out = torch.empty_like(heads)
        for i, (_, keys, values) in enumerate(self._gather(self.segments[self.first_document :], k, v)):
            out[i] = F.scaled_dot_product_attention(heads[i, None], keys, values, scale=scale)[0]
        return out.flatten(1, 2)

    def _gather(self, segments: list[_Segment], k: Tensor, v: Tensor) -> Iterator[tuple[_Segment, Tensor, Tensor]]:
        """Yield each segment with its keys and values, [1, G, keys, D] each, valid until the next one."""
        self.buffers = self.buffers or [x.new_empty(self.longest, *x.shape[1:]) for x in (k, v)]
        for segment in segments:
            for buffer, x in zip(self.buffers, (k, v), strict=True):
                torch.index_select(x, 0, segment.rows, out=buffer[segment.kept : segment.keys])
            keys, values = (buffer[: segment.keys].transpose(0, 1)[None] for buffer in self.buffers)
            yield segment, keys, values


class VarlenAttention:
    """One `varlen_attn` call for the whole batch: CUDA, 16-bit types, compute capability 8.0 and newer."""

    def __init__(self, batch: PackedBatch) -> None:
        self.kv_index = batch.kv_index
        self.cu_q, self.cu_k, self.cu_last = batch.cu_seqlens
        self.max_q, self.max_k = batch.shape.longest_q, batch.shape.longest_k

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_all`."""
        return self._attend(q, k, v, self.cu_q, self.max_q, scale)

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_last`."""
        return self._attend(q, k, v, self.cu_last, MAX_LAST_QUERIES, scale)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, max_q: int, scale: float) -> Tensor:
        k, v = k[self.kv_index], v[self.kv_index]
        assert _OPTIONS is not None  # choose_kernel
        out = varlen_attn(q, k, v, cu_q, self.cu_k, max_q, self.max_k, scale=scale, **_OPTIONS)
        assert isinstance(out, Tensor)  # a tuple only if auxiliary outputs are requested
        return out
