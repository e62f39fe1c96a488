"""Pack requests into one padding-free sequence that holds each request's prefix once. Pure: no model, no device.

Layout of a batch of R requests and N documents: all prefixes, then all documents in order. A segment is one prefix or
one document; there are S = R + N segments and T tokens. The model has cached the keys and values of the static prefix
(P rows), the common start of all prompts: the batch holds only the rest of each prefix.

    tokens     [prefix 0][prefix 1] ... [document 0,0][document 0,1] ... [document 1,0] ...
    keys       [static prefix][one per token]
    attention  a prefix sees its part of the static prefix, then itself; a document sees both, then itself; all causally
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reranker.types import Slice


class Shape(NamedTuple):
    """Sizes of a batch, on the host: T, N, K and S; tokens and keys of the longest segment."""

    tokens: int
    documents: int
    keys: int
    segments: int
    longest_q: int
    longest_k: int


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One forward pass. Its index tensors are built once per batch, not once per layer."""

    slices: tuple[Slice, ...]
    shape: Shape
    index: Tensor
    """[2T + N + K + 3(S + 1)] int64: all index tensors, concatenated, so that one copy moves them"""
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
        """[T] int64; a document's positions start at its prefix's length, a prefix's at its cached length"""
        return self.index[self.tokens : 2 * self.tokens]

    @property
    def last(self) -> Tensor:
        """[N] int64: the index of each document's last token"""
        return self.index[2 * self.tokens :][: self.shape.documents]

    @property
    def kv_index(self) -> Tensor:
        """[K] int64, below P + T: the keys that each segment sees, contiguous per segment"""
        return self.index[2 * self.tokens + self.shape.documents :][: self.shape.keys]

    @property
    def cu_seqlens(self) -> tuple[Tensor, Tensor, Tensor]:
        """Three times [S + 1] int32: each segment's start among the tokens, the gathered keys, and `last`"""
        q, k, last = self.index[-3 * (self.shape.segments + 1) :].int().chunk(3)
        return q, k, last

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on a device; the copy is asynchronous if the memory is pinned."""
        if device.type == "cpu":
            return self
        return replace(self, index=self.index.to(device, non_blocking=True))


def pack(slices: Sequence[Slice], *, static_prefix_len: int = 0, pinned: bool = False) -> PackedBatch:
    """Pack slices into one sequence.

    With lists of integers: for a short request, thirty small tensor operations take three times as long.

    Args:
        slices: each has at least one document, and a prefix that is not wholly cached, or none at all.
        static_prefix_len: P, the rows that the model has cached; no request uses more.
        pinned: for a copy to a GPU.
    """
    cached = [range(s.request.cached_prefix_len) for s in slices]
    groups = [s.documents for s in slices]
    segments = [*(s.request.prefix[s.request.cached_prefix_len :] for s in slices), *chain(*groups)]
    lengths_q = [len(segment) for segment in segments]
    cu_q = [*accumulate(lengths_q, initial=0)]
    own = [range(static_prefix_len + start, static_prefix_len + stop) for start, stop in pairwise(cu_q)]
    prefixes = [*zip(cached, own, strict=False)]
    prefix_of_document = chain(*([prefix] * len(group) for prefix, group in zip(prefixes, groups, strict=True)))
    documents = zip(prefix_of_document, own[len(slices) :], strict=True)
    keys = [*prefixes, *((*prefix, document) for prefix, document in documents)]
    lengths_k = [sum(map(len, ranges)) for ranges in keys]
    cu_k = [*accumulate(lengths_k, initial=0)]

    index = array("q", chain(*segments))
    index.extend(chain(*(range(k - q, k) for q, k in zip(lengths_q, lengths_k, strict=True))))  # positions
    index.extend(stop - 1 for stop in cu_q[len(slices) + 1 :])  # last
    index.extend(chain(*chain(*keys)))
    index.extend(cu_q)
    index.extend(cu_k)
    index.extend([0] * len(slices))  # in the last layer a document has one query, a prefix none
    index.extend(range(len(segments) - len(slices) + 1))
    tensor = torch.frombuffer(index, dtype=torch.int64)
    return PackedBatch(
        slices=tuple(slices),
        shape=Shape(cu_q[-1], len(segments) - len(slices), cu_k[-1], len(segments), max(lengths_q), max(lengths_k)),
        index=tensor.pin_memory() if pinned else tensor,
        lengths_q=tuple(lengths_q),
        lengths_k=tuple(lengths_k),
    )


def pad(batch: PackedBatch, shape: Shape, *, pinned: bool = False) -> PackedBatch:
    """Return the batch padded to a larger shape, for kernels that were recorded with that shape.

    The padding is one segment after the documents, whose keys are all the first key, and empty segments after it;
    nothing of the batch sees them. Logits after the batch's N are meaningless. The batch is on the host, and the
    shape is large enough: `shape.keys - K >= shape.tokens - T`, `shape.segments > S`. The lengths stay the batch's.
    """
    cu_q, cu_k, cu_last = (cu.long() for cu in batch.cu_seqlens)
    added = shape.tokens - batch.tokens
    parts = [batch.input_ids, batch.position_ids, batch.last, batch.kv_index, cu_q, cu_k, cu_last]
    sizes = [shape.tokens, shape.tokens, shape.documents, shape.keys, *[shape.segments + 1] * 3]
    values = [0, 0, 0, 0, shape.tokens, batch.shape.keys + added, shape.documents]
    padded = [F.pad(part, (0, size - len(part)), value=v) for part, size, v in zip(parts, sizes, values, strict=True)]
    index = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=pinned)
    return replace(batch, shape=shape, index=torch.cat(padded, out=index))
