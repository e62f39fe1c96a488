"""Attention over a packed batch: one interface, three kernels; tests/engine/test_attention.py compares them.

An attention object is created once per batch and called once per layer. Shapes: H query heads, G key/value heads, D
head dimension; T tokens, N documents, P cached keys of the static prefix, K gathered keys (see batch.py).
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from reranker.engine.batch import PackedBatch
from reranker.engine.grouped import MAX_MASK, GroupedAttention, shifted_causal

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


class Attention(Protocol):
    """Attention of one batch: for every token, or for the last token of each document."""

    def __init__(self, batch: PackedBatch) -> None: ...

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, H, D], k and v [P + T, G, D] -> [T, H, D]"""

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [N, H, D] of the documents' last tokens, k and v [P + T, G, D] -> [N, H, D]"""


def choose_kernel(device: torch.device, dtype: torch.dtype) -> tuple[type[Attention], str]:
    """Return the kernel for a device and precision, and the reason, for the log."""
    if device.type != "cuda":
        missing = "no varlen kernel on this device"
    elif _OPTIONS is None:
        missing = "this torch is older than 2.11, and has no varlen_attn with these options"
    elif dtype not in (torch.bfloat16, torch.float16):
        missing = "the varlen kernel takes 16-bit types only"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        missing = "the varlen kernel needs compute capability 8.0"
    else:
        return VarlenAttention, "varlen_attn (one call per layer)"
    if device.type == "cuda":
        return GroupedAttention, f"scaled_dot_product_attention per group of lengths ({missing})"
    return SdpaAttention, f"scaled_dot_product_attention per segment ({missing})"


class SdpaAttention:
    """`scaled_dot_product_attention` segment by segment: for a CPU.

    A segment's queries also see the keys shared before it, so the causal diagonal is shifted. A segment longer than
    its shared keys gets that number of zero queries in front, and their outputs are dropped: the kernel's causal mode
    skips more work than they add, and no mask of the document's length squared is built. Shorter segments use a mask.
    """

    def __init__(self, batch: PackedBatch) -> None:
        self.kv_index = batch.kv_index
        self.first_document = batch.prefixes
        self.segments: list[tuple[int, int, int, int, Tensor | None]] = []
        """(query start, query stop, key start, key stop, mask)"""
        masks: dict[int, Tensor] = {}
        start = key = 0
        for queries, keys in zip(batch.lengths_q, batch.lengths_k, strict=True):
            shared = keys - queries
            mask = None
            if queries < shared and queries * keys <= MAX_MASK:
                if shared not in masks:
                    longest = min(shared, MAX_MASK // shared)
                    masks[shared] = shifted_causal(longest, shared, batch.input_ids.device)
                mask = masks[shared][:queries, :keys]
            self.segments.append((start, start + queries, key, key + keys, mask))
            start, key = start + queries, key + keys

    def attend_all(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_all`."""
        heads, keys, values = q.transpose(0, 1)[None], *self._gather(k, v)
        out = torch.empty_like(q)
        for start, stop, k0, k1, mask in self.segments:
            queries = heads[:, :, start:stop]
            if mask is None:
                queries = F.pad(queries, (0, 0, k1 - k0 - (stop - start), 0))
            attended = F.scaled_dot_product_attention(
                queries,
                keys[:, :, k0:k1],
                values[:, :, k0:k1],
                attn_mask=None if mask is None else mask.to(q.dtype),
                is_causal=mask is None,
                scale=scale,
                enable_gqa=True,
            )
            out[start:stop] = attended[0, :, start - stop :].transpose(0, 1)
        return out

    def attend_last(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """See `Attention.attend_last`."""
        keys, values = self._gather(k, v)
        out = torch.empty_like(q)
        for i, (_, _, k0, k1, _) in enumerate(self.segments[self.first_document :]):
            attended = F.scaled_dot_product_attention(
                q[i][None, :, None], keys[:, :, k0:k1], values[:, :, k0:k1], scale=scale, enable_gqa=True
            )
            out[i] = attended[0, :, 0]
        return out

    def _gather(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """[P + T, G, D] -> [1, G, K, D], contiguous per segment"""
        k, v = k[self.kv_index], v[self.kv_index]
        return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


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
