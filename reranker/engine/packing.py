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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reranker.types import Slice


class Shape(NamedTuple):
    """Sizes of a batch, on the host."""

    tokens: int
    """T"""
    documents: int
    """N"""
    keys: int
    """K"""
    segments: int
    """S"""
    longest_q: int
    """Tokens of the longest segment"""
    longest_k: int
    """Keys of the longest segment"""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass. All index tensors are made once a batch, none once a layer."""

    slices: tuple[Slice, ...]
    shape: Shape
    index: Tensor
    """[2T + N + K + 3(S + 1)] int64: every index tensor, one behind the other, so that one copy moves them all"""
    lengths_q: tuple[int, ...]
    """[S] tokens of each segment, on the host"""
    lengths_k: tuple[int, ...]
    """[S] keys of each segment, on the host"""

    @property
    def tokens(self) -> int:
        """T"""
        return self.shape.tokens

    @property
    def prefixes(self) -> int:
        """R: the first R segments are prefixes."""
        return len(self.slices)

    @property
    def input_ids(self) -> Tensor:
        """[T] int64"""
        return self.index[: self.tokens]

    @property
    def position_ids(self) -> Tensor:
        """[T] int64; a document's positions start at the length of its prefix"""
        return self.index[self.tokens : 2 * self.tokens]

    @property
    def last(self) -> Tensor:
        """[N] int64: the index of each document's last token"""
        return self.index[2 * self.tokens :][: self.shape.documents]

    @property
    def kv_index(self) -> Tensor:
        """[K] int64: keys of every segment, contiguous: a prefix itself; a document its prefix and itself"""
        return self.index[2 * self.tokens + self.shape.documents :][: self.shape.keys]

    @property
    def cu_seqlens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [S + 1] int32: where each segment begins among the tokens, the gathered keys, and `last`"""
        q, k, last = self.index[-3 * (self.shape.segments + 1) :].int().chunk(3)
        return q, k, last

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on a device; the copy runs behind the host where memory is pinned."""
        if device.type == "cpu":
            return self
        return replace(self, index=self.index.to(device, non_blocking=True))


def pack(slices: Sequence[Slice], *, pinned: bool = False) -> PackedBatch:
    """Lay slices out as one sequence; every slice has at least one document. `pinned`: for a copy to a GPU."""
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

    tokens = list(chain(*prefixes, *(d for group in documents for d in group)))
    last = cu_q[len(slices) + 1 :] - 1
    cu_last = (torch.arange(len(lengths_q) + 1) - len(slices)).clamp_min(0)  # one query a document, none a prefix
    lengths_k = tuple(length_k.tolist())
    return PackedBatch(
        slices=tuple(slices),
        shape=Shape(len(tokens), len(last), len(kv_index), len(lengths_q), max(lengths_q), max(lengths_k)),
        index=_joined([torch.tensor(tokens), position_ids, last, kv_index, cu_q, cu_k, cu_last], pinned),
        lengths_q=tuple(lengths_q),
        lengths_k=lengths_k,
    )


def pad(batch: PackedBatch, shape: Shape, *, pinned: bool = False) -> PackedBatch:
    """The same batch in a larger shape, for kernels that were recorded for that shape.

    All that is added is one segment of its own behind the documents, whose tokens see each other only, and segments
    of no length behind it; nothing of the batch sees them. Logits beyond the batch's N mean nothing. The batch is on
    the host and leaves room: `shape.keys - K >= shape.tokens - T`, `shape.segments > S`. The lengths stay the batch's.
    """
    cu_q, cu_k, cu_last = (cu.long() for cu in batch.cu_seqlens)
    added = shape.tokens - batch.tokens
    parts = [batch.input_ids, batch.position_ids, batch.last, batch.kv_index, cu_q, cu_k, cu_last]
    sizes = [shape.tokens, shape.tokens, shape.documents, shape.keys, *[shape.segments + 1] * 3]
    fill = [0, 0, 0, 0, shape.tokens, batch.shape.keys + added, shape.documents]
    padded = [F.pad(part, (0, size - len(part)), value=v) for part, size, v in zip(parts, sizes, fill, strict=True)]
    return replace(batch, shape=shape, index=_joined(padded, pinned))


def _joined(parts: list[Tensor], pinned: bool) -> Tensor:
    """One int64 tensor of all parts."""
    return torch.cat(parts, out=torch.empty(sum(map(len, parts)), dtype=torch.int64, pin_memory=pinned))


def _cumulative(lengths: Tensor) -> Tensor:
    """[S] lengths -> [S + 1] starts"""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
