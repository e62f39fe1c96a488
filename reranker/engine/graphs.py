"""CUDA graphs for small batches, where launching a kernel takes longer than the kernel.

A pass is recorded once for each of a few shapes. A batch is padded up to the next shape (packing.pad), copied into
that recording's own index tensor, and the recording is replayed: one launch instead of about a thousand.
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
MOST_TOKENS = 2048
SIZES = range(_STEP, MOST_TOKENS + 1, _STEP)


def bucket(tokens: int) -> Shape:
    """The shape recorded for batches of up to so many tokens.

    Attention starts a block of threads for each segment and 128 tokens of `longest_q` and ends the idle ones at once,
    and all keys are gathered: generous bounds would cost more than they cover. So ten documents of any size, or more if
    they have 64 tokens on average, none above 512, and two keys a token beside the prompts of those ten; anything else
    goes the ordinary way.
    """
    tokens = -(-tokens // _STEP) * _STEP
    most, keys = tokens // 64 + 12, 2 * tokens + 1024
    return Shape(tokens, most, keys, most, min(tokens, 512), keys)


def fits(batch: PackedBatch, shape: Shape) -> bool:
    """Whether the batch can be padded to the shape, the segment that takes the padding included."""
    b = batch.shape
    added = shape.tokens - b.tokens
    return (
        added >= 0
        and b.documents <= shape.documents
        and b.segments < shape.segments
        and b.keys + added <= shape.keys
        and b.longest_q <= shape.longest_q
    )


@dataclass(frozen=True, slots=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    batch: PackedBatch
    """What the recording reads: written over before every replay."""
    hidden: Tensor
    """What it writes: [documents of the shape, hidden_size]"""


class Graphs:
    """Recorded passes of one model, by shape. One thread at a time.

    Args:
        forward: [N, hidden_size] of a batch on the device; launches only, no synchronisation.
        device: the GPU.
    """

    def __init__(self, forward: Callable[[PackedBatch], Tensor], device: torch.device) -> None:
        self._forward = forward
        self._device = device
        self._recordings: dict[Shape, _Recording] = {}
        self._memory = torch.cuda.graph_pool_handle()  # shared: no two recordings run at the same time
        self._aside = torch.cuda.Stream(device)  # one for all: the allocator keeps memory for each stream by itself

    def __len__(self) -> int:
        return len(self._recordings)

    @torch.inference_mode()
    def record(self, batch: PackedBatch) -> None:
        """Record the pass of the batch's bucket; the largest goes first, so that all find room in its memory.

        Raises:
            RuntimeError: the device or a kernel cannot be recorded, or lacks memory.
            ValueError: the batch does not fit its bucket.
        """
        shape = bucket(batch.tokens)
        if not fits(batch, shape):
            raise ValueError(f"{batch.shape} does not fit {shape}")
        static = pad(batch, shape).to(self._device)
        # The outer `stream` puts this thread back on its own, which a recording that fails does not.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.current_stream(self._device)):
            self._aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._aside):  # what libraries set up on their first call may not be recorded
                self._forward(static)
            torch.cuda.current_stream().wait_stream(self._aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                hidden = self._forward(static)
        self._recordings[shape] = _Recording(graph, static, hidden)

    def forget(self, tokens: int) -> None:
        """Let batches of so many tokens go the ordinary way."""
        self._recordings.pop(bucket(tokens), None)

    @torch.inference_mode()
    def replay(self, batch: PackedBatch) -> Tensor | None:
        """[N, hidden_size], valid until the next replay; None where no recording fits the batch."""
        shape = bucket(batch.tokens)
        recording = self._recordings.get(shape)
        if recording is None or not fits(batch, shape):
            return None
        padded = pad(batch, shape, pinned=self._device.type == "cuda")
        recording.batch.index.copy_(padded.index, non_blocking=True)
        recording.graph.replay()
        return recording.hidden[: batch.shape.documents]
