"""Many requests in one padding-free sequence, with each request's prefix there once. Pure: no model, no device.

Layout of a batch of R requests and N documents: first all prefixes, then all documents in order. A segment is one
prefix or one document; there are S = R + N of them. T tokens in all.

    tokens     [prefix 0][prefix 1] ... [document 0,0][document 0,1] ... [document 1,0] ...
    attention  a prefix sees itself; a document sees its request's prefix, then itself; both causally
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from reranker.types import Slice


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass. All index tensors are made once a batch, none once a layer."""

    slices: tuple[Slice, ...]
    input_ids: Tensor
    """[T] int64"""
    position_ids: Tensor
    """[T] int64; a document's positions start at the length of its prefix"""
    last: Tensor
    """[N] int64: the index of each document's last token"""
    kv_index: Tensor
    """[K] int64: keys of every segment, contiguous: a prefix itself; a document its prefix and itself"""
    cu_seqlens_q: Tensor
    """[S + 1] int32: where each segment begins among the tokens"""
    cu_seqlens_k: Tensor
    """[S + 1] int32: where each segment's keys begin among the gathered keys"""
    lengths_q: tuple[int, ...]
    """[S] tokens of each segment, on the host"""
    lengths_k: tuple[int, ...]
    """[S] keys of each segment, on the host"""

    @property
    def tokens(self) -> int:
        """T"""
        return self.input_ids.shape[0]

    @property
    def prefixes(self) -> int:
        """R: the first R segments are prefixes."""
        return len(self.slices)

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device; copies run behind the host where memory is pinned."""
        if device.type == "cpu":
            return self
        tensors = ("input_ids", "position_ids", "last", "kv_index", "cu_seqlens_q", "cu_seqlens_k")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in tensors})


def pack(slices: Sequence[Slice]) -> PackedBatch:
    """Lay slices out as one sequence; every slice has at least one document."""
    prefixes = [s.request.prefix for s in slices]
    documents = [s.documents for s in slices]
    lengths_q = [*map(len, prefixes), *(len(d) for group in documents for d in group)]
    shared = [0] * len(slices) + [len(p) for p, group in zip(prefixes, documents, strict=True) for _ in group]
    owner = [*range(len(slices)), *(i for i, group in enumerate(documents) for _ in group)]

    length_q = torch.tensor(lengths_q)
    prefix_length = torch.tensor(shared)
    length_k = length_q + prefix_length
    cu_q, cu_k = _cumulative(length_q), _cumulative(length_k)
    prefix_start = cu_q[torch.tensor(owner)]

    segment = torch.repeat_interleave(length_q)
    position_ids = torch.arange(len(segment)) - cu_q[segment] + prefix_length[segment]
    segment = torch.repeat_interleave(length_k)
    offset = torch.arange(len(segment)) - cu_k[segment]
    own = offset - prefix_length[segment]
    kv_index = torch.where(own < 0, prefix_start[segment] + offset, cu_q[segment] + own)

    tokens = chain(*prefixes, *(d for group in documents for d in group))
    return PackedBatch(
        slices=tuple(slices),
        input_ids=torch.tensor(list(tokens)),
        position_ids=position_ids,
        last=cu_q[len(slices) + 1 :] - 1,
        kv_index=kv_index,
        cu_seqlens_q=cu_q.int(),
        cu_seqlens_k=cu_k.int(),
        lengths_q=tuple(lengths_q),
        lengths_k=tuple(length_k.tolist()),
    )


def _cumulative(lengths: Tensor) -> Tensor:
    """[S] lengths -> [S + 1] starts"""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
