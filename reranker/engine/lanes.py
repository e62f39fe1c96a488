"""One forward pass per core: the documents of a batch are dealt to lanes, each a thread with its share of the cores.

Cores that split one product wait for each other, and between products (norms, rotary embedding, attention of single
documents) most of them are idle. Lanes share only the weights, so they never wait, and a score does not depend on the
lane. `benchmarks/lanes.py` measures the gain.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import NamedTuple

import torch
from torch import Tensor

from reranker.engine.batch import PackedBatch
from reranker.types import Slice

_EVEN = 1.05
"""A deal is even enough if its largest lane has at most this multiple of an equal share."""
MIN_TOKENS = 256
"""Of a lane. Below it, computing a prefix twice and small products cost more than the lane gains."""


class Deal(NamedTuple):
    """The part of a batch that one lane computes."""

    slices: tuple[Slice, ...]
    positions: tuple[int, ...]
    """For each document in the order of `slices`, its index in the batch."""


@dataclass(frozen=True, slots=True)
class DealtBatch:
    """A batch in two or more lanes."""

    slices: tuple[Slice, ...]
    parts: tuple[PackedBatch, ...]
    positions: tuple[tuple[int, ...], ...]
    """For each part, the indices of its documents in the batch."""

    @property
    def tokens(self) -> int:
        """Tokens of all lanes; a prefix counts in every lane that computes it."""
        return sum(part.tokens for part in self.parts)


def deal(slices: Sequence[Slice], lanes: int) -> list[Deal]:
    """Divide a batch into at most `lanes` lanes of about equal tokens, the largest first; every lane has a document.

    Whole requests first, largest first, so that a prefix is computed once. If the lanes are then unequal, the largest
    requests are split by document, as few of them as possible. The largest comes first because a thread that is idle
    at the end of the pass before takes it, and ends with the others.
    """
    offsets = [0, *accumulate(part.stop - part.start for part in slices)]
    lanes = min(lanes, offsets[-1])
    by_size = sorted(range(len(slices)), key=lambda i: slices[i].tokens, reverse=True)
    enough = sum(part.tokens for part in slices) / lanes * _EVEN
    attempts: list[tuple[int, list[dict[int, list[int]]]]] = []
    for split in sorted({0, 1, 2, lanes, len(slices)}):
        if split <= len(slices):
            attempts.append(_distribute(slices, by_size[:split], by_size[split:], lanes))
            if attempts[-1][0] <= enough:
                break
    _, best = min(attempts, key=lambda attempt: attempt[0])
    dealt = [_deal(slices, offsets, documents) for documents in best if documents]
    return sorted(dealt, key=lambda part: sum(share.tokens for share in part.slices), reverse=True)


def _distribute(
    slices: Sequence[Slice], split: Sequence[int], whole: Sequence[int], lanes: int
) -> tuple[int, list[dict[int, list[int]]]]:
    """Give each next largest slice or document to the lane with the fewest tokens.

    Returns:
        The tokens of the largest lane, and each lane's documents: slice -> documents of its request.
    """
    loads = [(0, lane) for lane in range(lanes)]
    hands: list[dict[int, list[int]]] = [{} for _ in range(lanes)]
    for i in whole:
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + slices[i].tokens, lane))
        hands[lane][i] = list(range(slices[i].start, slices[i].stop))
    documents = (
        (len(slices[i].request.documents[j]), i, j) for i in split for j in range(slices[i].start, slices[i].stop)
    )
    for tokens, i, j in sorted(documents, reverse=True):
        load, lane = loads[0]
        if i not in hands[lane]:
            load += len(slices[i].request.prefix) - slices[i].request.cached_prefix_len
        heapq.heapreplace(loads, (load + tokens, lane))
        hands[lane].setdefault(i, []).append(j)
    return max(load for load, _ in loads), hands


def _deal(slices: Sequence[Slice], offsets: Sequence[int], documents: Mapping[int, list[int]]) -> Deal:
    """Make the slices of one lane: a whole slice as it is, a part of one as a request with some of its documents."""
    parts: list[Slice] = []
    positions: list[int] = []
    for i in sorted(documents):
        part, indices = slices[i], sorted(documents[i])
        positions += [offsets[i] + j - part.start for j in indices]
        if len(indices) < part.stop - part.start:
            request = replace(part.request, documents=[part.request.documents[j] for j in indices], chunks=None)
            part = Slice(request, 0, len(indices))
        parts.append(part)
    return Deal(tuple(parts), tuple(positions))


class Lanes:
    """Threads that each run a forward pass with their share of the cores.

    Attributes:
        on_idle: called in a thread when a part has ended and cores are idle, so that the next batch may start.

    Args:
        count: the number of threads, at least 2.
        cores: the number of threads that torch may use in total; the parts that run share them.
    """

    def __init__(self, count: int, cores: int) -> None:
        self.count = count
        self.cores = cores
        self.on_idle: Callable[[], None] = lambda: None
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="lane")
        self._threads = torch.get_num_threads()  # not of the caller of `run`, which may be new
        self._changed = threading.Condition()
        self._waiting = 0  # parts that no lane has taken
        self._widths: list[int] = []  # cores of each part that runs
        self._wide = False  # a pass with all cores runs

    @property
    def idle(self) -> bool:
        """Whether the cores of a lane have nothing to do."""
        free = self.cores - sum(self._widths)
        return not self._wide and not self._waiting and free >= max(1, self.cores // self.count)

    def count_for(self, slices: Sequence[Slice]) -> int:
        """Return the number of lanes for a batch: at most one per document and per MIN_TOKENS, at least one."""
        documents = sum(part.stop - part.start for part in slices)
        return max(1, min(self.count, documents, sum(part.tokens for part in slices) // MIN_TOKENS))

    def run(self, forward: Callable[[PackedBatch], Tensor], batch: PackedBatch | DealtBatch) -> list[float]:
        """Return the logits of the batch's documents, in order; its lanes may start while those of another batch end.

        A batch that was not dealt uses all cores, or the lane that is idle first if other batches run.

        Raises:
            RuntimeError: of the first lane that failed, after all lanes of the batch have ended, so that none runs
                beside its retry.
        """
        parts = batch.parts if isinstance(batch, DealtBatch) else (batch,)
        with self._changed:
            self._changed.wait_for(lambda: not self._wide)
            wide = self._wide = len(parts) == 1 and not self._waiting and not self._widths
            self._waiting += 0 if wide else len(parts)
        if wide:
            return self._run_wide(forward, parts[0])
        lanes: list[Future[list[float]]] = []
        try:
            for part in parts:
                lanes.append(self._pool.submit(self._run, forward, part))
            wait(lanes)
            logits = list(map(Future.result, lanes))
        finally:
            lanes.clear()  # an error refers to this frame, and would keep the tensors of its pass through the list
        if not isinstance(batch, DealtBatch):
            return logits[0]
        by_position = dict(zip(chain(*batch.positions), chain(*logits), strict=True))
        return [by_position[position] for position in range(len(by_position))]

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _run(self, forward: Callable[[PackedBatch], Tensor], part: PackedBatch) -> list[float]:
        with self._changed:
            sharing = min(self.count, self._waiting + len(self._widths))  # this part is one of those that wait
            width = max(1, self.cores // sharing)
            self._waiting -= 1
            self._widths.append(width)
        torch.set_num_threads(width)  # of this thread alone, in the OpenMP build and in MKL
        try:
            logits: list[float] = forward(part).tolist()
            return logits
        finally:
            with self._changed:
                self._widths.remove(width)
                if not self._widths and not self._waiting:
                    # A lane's number is MKL's for all threads, and that of every thread that starts.
                    torch.set_num_threads(self._threads)
                self._changed.notify_all()
            if self.idle:
                self.on_idle()

    def _run_wide(self, forward: Callable[[PackedBatch], Tensor], batch: PackedBatch) -> list[float]:
        try:
            torch.set_num_threads(self.cores)
            logits: list[float] = forward(batch).tolist()
            return logits
        finally:
            torch.set_num_threads(self._threads)
            with self._changed:
                self._wide = False
                self._changed.notify_all()
