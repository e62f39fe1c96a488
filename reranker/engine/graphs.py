"""CUDA graphs for small batches, whose kernels take less time than their launches.

A pass is recorded once for each of a few shapes. A batch is padded to the next larger shape (`batch.pad`) and copied
into that recording's index tensor, and the recording is replayed: one launch instead of about a thousand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from reranker.engine.batch import PackedBatch, Shape, pad

# Matrix products work in tiles of 128 rows: a finer step would save no time.
_STEP = 128
# Above it the kernels take longer than their launches (7 GFLOP a token for 4B: 18 ms on an H200).
MAX_TOKENS = 2048
SIZES = range(_STEP, MAX_TOKENS + 1, _STEP)


def bucket(tokens: int) -> Shape:
    """Return the shape that is recorded for batches of `tokens` tokens.

    Attention starts a thread block for each segment and 128 tokens of `longest_q` (idle blocks end immediately) and
    gathers all keys, so generous limits would cost more than the batches they admit save. The shape admits ten
    documents of any size, or more with 64 tokens on average, none above 512, and two keys per token in addition to the
    prefixes of those ten; any other batch takes the eager or compiled path.
    """
    tokens = -(-tokens // _STEP) * _STEP
    segments, keys = tokens // 64 + 12, 2 * tokens + 1024
    return Shape(tokens, segments, keys, segments, min(tokens, 512), keys)


def fits(batch: PackedBatch, shape: Shape) -> bool:
    """Whether the batch can be padded to the shape, including the segment for the padding."""
    b = batch.shape
    added = shape.tokens - b.tokens
    room = added >= 0 and b.keys + added <= shape.keys and b.longest_q <= shape.longest_q
    return room and b.documents <= shape.documents and b.segments < shape.segments


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    """Input of the recording; its index is overwritten before every replay."""
    hidden: Tensor
    """Output of the recording: [documents of the shape, hidden_size]"""


class Graphs:
    """Recorded passes of one model, by shape. Not thread-safe.

    Args:
        forward: [N, hidden_size] of a batch on the device; launches only, no synchronisation.
        device: the GPU.
    """

    def __init__(self, forward: Callable[[PackedBatch], Tensor], device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._recordings: dict[Shape, _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()  # shared, because no two recordings run at the same time
        self._stream = torch.cuda.Stream(device)  # shared, because the allocator keeps memory per stream

    def __len__(self) -> int:
        return len(self._recordings)

    @torch.inference_mode()
    def record(self, batch: PackedBatch) -> None:
        """Record the pass of the batch's bucket; record the largest first, so that all fit into its memory.

        Raises:
            RuntimeError: the device or a kernel does not support recording, or lacks memory.
            ValueError: the batch does not fit its bucket.
        """
        shape = bucket(batch.tokens)
        if not fits(batch, shape):
            raise ValueError(f"{batch.shape} does not fit {shape}")
        static = pad(batch, shape).to(self._device)
        # The outer `stream` restores this thread's stream, which a failed recording does not.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):  # the first call sets up libraries, which must not be recorded
                self._forward(static)
            torch.cuda.current_stream().wait_stream(self._stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                hidden = self._forward(static)
        self._recordings[shape] = _Recording(graph, static, hidden)

    def drop(self, tokens: int) -> None:
        """Drop the recording for batches of `tokens` tokens."""
        self._recordings.pop(bucket(tokens), None)

    @torch.inference_mode()
    def replay(self, batch: PackedBatch) -> Tensor | None:
        """Return [N, hidden_size], valid until the next replay; None if no recording fits the batch."""
        shape = bucket(batch.tokens)
        recording = self._recordings.get(shape)
        if recording is None or not fits(batch, shape):
            return None
        padded = pad(batch, shape, pinned=self._device.type == "cuda")
        recording.batch.index.copy_(padded.index, non_blocking=True)
        recording.graph.replay()
        return recording.hidden[: batch.shape.documents]
