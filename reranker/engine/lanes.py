"""One forward pass per core: the documents of a batch are dealt to lanes, each a thread with its share of the cores.

A product that is split over cores makes them wait for each other, and between products (norms, rotary embedding,
attention of single documents) most of them idle. Lanes share nothing but the weights, so they never wait, and a score
is that of any other packing. `benchmarks/lanes.py` measures what that brings.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reranker.engine.batch import PackedBatch
from reranker.types import Slice

# A deal whose largest lane is so near to an equal share is good enough: every further prefix that is split costs more.
_EVEN = 1.05
LEAST_TOKENS = 256
"""Of a lane: with fewer, computing a prefix twice and small products cost more than the lane brings."""


@dataclass(frozen=True, slots=True)
class Deal:
    """What one lane gets of a batch."""

    slices: tuple[Slice, ...]
    places: tuple[int, ...]
    """Where each of its documents stands in the batch, in the order of `slices`."""


@dataclass(frozen=True, slots=True)
class DealtBatch:
    """A batch in two or more lanes."""

    slices: tuple[Slice, ...]
    parts: tuple[PackedBatch, ...]
    places: tuple[tuple[int, ...], ...]
    """For each part, where its documents stand in the batch."""

    @property
    def tokens(self) -> int:
        """Tokens of all lanes; a prefix counts in every lane that computes it."""
        return sum(part.tokens for part in self.parts)


def deal(slices: Sequence[Slice], lanes: int) -> list[Deal]:
    """Share a batch among lanes, about equal in tokens; at most one lane for each document, none without any.

    Whole requests first, largest first, so that a prefix is computed once; where that leaves lanes unequal, the
    largest requests are split, document by document.

    Args:
        slices: the batch.
        lanes: at most so many.
    """
    lanes = min(lanes, sum(s.stop - s.start for s in slices))
    by_size = sorted(range(len(slices)), key=lambda i: slices[i].tokens, reverse=True)
    share = sum(s.tokens for s in slices) / lanes
    best: tuple[float, list[list[tuple[int, int]]]] | None = None
    for divided in sorted({0, 1, 2, lanes, len(slices)}):
        if divided > len(slices):
            break
        largest, dealt = _dealt(slices, by_size[:divided], by_size[divided:], lanes)
        if best is None or largest < best[0]:
            best = largest, dealt
        if largest <= share * _EVEN:
            break
    assert best is not None  # 0 is always tried
    firsts = [0]
    for part in slices:
        firsts.append(firsts[-1] + part.stop - part.start)
    return [_deal(slices, firsts, sorted(documents)) for documents in best[1] if documents]


def _dealt(
    slices: Sequence[Slice], divided: Sequence[int], whole: Sequence[int], lanes: int
) -> tuple[float, list[list[tuple[int, int]]]]:
    """Tokens of the largest lane, and each lane's documents as (slice, document of its request)."""
    loads = [(0, lane) for lane in range(lanes)]
    dealt: list[list[tuple[int, int]]] = [[] for _ in range(lanes)]
    for i in whole:
        load, lane = loads[0]
        heapq.heapreplace(loads, (load + slices[i].tokens, lane))
        dealt[lane] += [(i, j) for j in range(slices[i].start, slices[i].stop)]
    documents = (
        (len(slices[i].request.documents[j]), i, j) for i in divided for j in range(slices[i].start, slices[i].stop)
    )
    known: set[tuple[int, int]] = set()
    for tokens, i, j in sorted(documents, reverse=True):
        load, lane = loads[0]
        if (i, lane) not in known:
            known.add((i, lane))
            load += len(slices[i].request.prefix) - slices[i].request.cached_prefix_len
        heapq.heapreplace(loads, (load + tokens, lane))
        dealt[lane].append((i, j))
    return max(load for load, _ in loads), dealt


def _deal(slices: Sequence[Slice], firsts: Sequence[int], documents: Sequence[tuple[int, int]]) -> Deal:
    """The slices of one lane: a whole one as it is, of another one a request with some of its documents."""
    made: list[Slice] = []
    places: list[int] = []
    chosen: dict[int, list[int]] = {}
    for i, j in documents:
        chosen.setdefault(i, []).append(j)
    for i, indices in chosen.items():
        part = slices[i]
        places += [firsts[i] + j - part.start for j in indices]
        if len(indices) == part.stop - part.start:
            made.append(part)
            continue
        request = replace(part.request, documents=[part.request.documents[j] for j in indices], chunks=None)
        made.append(Slice(request, 0, len(indices)))
    return Deal(tuple(made), tuple(places))


class Lanes:
    """Threads that each run a forward pass with their share of the cores.

    Args:
        count: how many, at least 2.
        cores: threads that torch may use in all; the lanes of a batch share them.
    """

    def __init__(self, count: int, cores: int) -> None:
        self.count = count
        self.cores = cores
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="lane")

    def wanted(self, slices: Sequence[Slice]) -> int:
        """How many lanes a batch is worth: one for each document at most, and none for a handful of tokens."""
        documents = sum(part.stop - part.start for part in slices)
        return max(1, min(self.count, documents, sum(part.tokens for part in slices) // LEAST_TOKENS))

    def run(self, forward: Callable[[PackedBatch], Tensor], batch: DealtBatch) -> list[float]:
        """Logits of the batch's documents, in order.

        Raises:
            RuntimeError: that of the first lane which failed, when all have ended: nothing runs beside the next pass.
        """
        width = max(1, self.cores // len(batch.parts))
        before = torch.get_num_threads()
        running: list[Future[list[float]]] = [self._pool.submit(_one, width, forward, part) for part in batch.parts]
        try:
            wait(running)
            logits = [0.0] * sum(map(len, batch.places))
            for places, scored in zip(batch.places, map(Future.result, running), strict=True):
                for place, logit in zip(places, scored, strict=True):
                    logits[place] = logit
            return logits
        finally:
            running.clear()  # an error refers to this frame, and would keep the tensors of its pass through the list
            torch.set_num_threads(before)  # what a lane sets is the default of every thread that begins later

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _one(width: int, forward: Callable[[PackedBatch], Tensor], part: PackedBatch) -> list[float]:
    torch.set_num_threads(width)  # of this thread alone, in the OpenMP build and in MKL
    logits: list[float] = forward(part).tolist()
    return logits
