from __future__ import annotations

import copy
import gc
import random
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.card import Card
from reranker import Scorer
from reranker.engine import lanes as lanes_module
from reranker.engine.batch import PackedBatch
from reranker.engine.lanes import DealtBatch, Lanes, deal
from reranker.types import EncodedRequest, Slice
from tests.engine.test_scorer import expected, packed, requests


def slices(rng: random.Random, count: int, documents: int) -> list[Slice]:
    """Slices of random requests; some start in the middle of their request."""
    result = []
    for _ in range(count):
        cached = rng.choice([0, 5])
        texts = [
            [rng.randrange(100)] * rng.choice([1, 5, rng.randrange(1, 300)]) for _ in range(rng.randrange(1, documents))
        ]
        start = rng.randrange(len(texts))
        request = EncodedRequest([1] * (cached + rng.randrange(1, 60)), texts, cached_prefix_len=cached)
        result.append(Slice(request, start, rng.randrange(start, len(texts)) + 1))
    return result


@pytest.mark.parametrize("seed", range(40))
def test_every_document_is_dealt_once_and_lanes_are_even(seed: int) -> None:
    rng = random.Random(seed)
    batch = slices(rng, rng.randrange(1, 12), rng.choice([2, 5, 60]))
    lanes = rng.choice([2, 3, 8])
    dealt = deal(batch, lanes)
    flat = [document for part in batch for document in part.documents]
    assert 1 <= len(dealt) <= min(lanes, len(flat))
    assert sorted(position for lane in dealt for position in lane.positions) == list(range(len(flat)))
    for lane in dealt:
        assert [document for part in lane.slices for document in part.documents] == [flat[p] for p in lane.positions]
        assert all(part.start < part.stop for part in lane.slices)
    # No worse than the bound of longest-first dealing: an equal share, and one more document with its prefix.
    loads = [sum(part.tokens for part in lane.slices) for lane in dealt]
    assert loads == sorted(loads, reverse=True)
    largest = max(len(d) + len(part.request.prefix) for part in batch for d in part.documents)
    assert max(loads) <= sum(part.tokens for part in batch) / min(lanes, len(flat)) + largest * min(lanes, len(batch))


def test_requests_stay_whole_where_that_is_even() -> None:
    batch = [Slice(EncodedRequest([1] * 20, [[2] * 30] * 10), 0, 10) for _ in range(6)]
    dealt = deal(batch, 3)
    assert [len(lane.slices) for lane in dealt] == [2, 2, 2]
    assert all(part in batch for lane in dealt for part in lane.slices)


def test_one_request_is_split_longest_documents_first() -> None:
    documents = [[2] * n for n in (100, 90, 10, 20, 30, 50)]
    first, second = deal([Slice(EncodedRequest([1] * 5, documents), 0, 6)], 2)
    assert {first.positions, second.positions} == {(0, 4, 3), (1, 5, 2)} or sum(
        map(len, first.slices[0].documents)
    ) == pytest.approx(150, abs=10)


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> Scorer:
    return Scorer.load(model_path, device="cpu", precision="float32")


@pytest.fixture
def scorer(loaded: Scorer, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Scorer:
    """A copy, whose lanes, model and budget a test may replace."""
    if "256_tokens" not in request.node.name:
        monkeypatch.setattr(lanes_module, "MIN_TOKENS", 1)  # small batches, so that many shapes are dealt
    return copy.copy(loaded)


@pytest.mark.parametrize("count", [2, 3, 5])
def test_lanes_equal_the_card_on_random_shapes(scorer: Scorer, card: Card, count: int) -> None:
    """The test that licenses the module."""
    scorer.lanes = Lanes(count, count)
    rng = random.Random(count)
    dealt = 0
    for _ in range(8):
        group = requests(rng, rng.randrange(1, 5))
        batch = scorer.pack([Slice(e, 0, len(e.documents)) for e in map(scorer.encode, group)])
        dealt += isinstance(batch, DealtBatch)
        assert packed(scorer, group) == [pytest.approx(expected(card, request), abs=1e-4) for request in group]
    assert dealt > 4


def test_how_a_batch_is_dealt_changes_no_score(scorer: Scorer) -> None:
    rng = random.Random(1)
    group = requests(rng, 4, documents=9)
    plain = packed(scorer, group)
    for count in (2, 3, 4, 7):
        scorer.lanes = Lanes(count, 1)
        assert packed(scorer, group) == [pytest.approx(logits, abs=2e-5) for logits in plain]


def test_a_batch_has_at_most_a_lane_for_each_document_and_256_tokens(scorer: Scorer) -> None:
    lanes = scorer.lanes = Lanes(4, 4)
    for documents, tokens, expected_lanes in (
        (1, 5000, 1),
        (2, 5000, 2),
        (9, 5000, 4),
        (9, 700, 2),
        (9, 300, 1),
        (3, 40, 1),
    ):
        size = (tokens - 10) // documents
        part = Slice(EncodedRequest([1] * 10, [[2] * size] * documents), 0, documents)
        assert lanes.count_for([part]) == expected_lanes
        assert isinstance(scorer.pack([part]), PackedBatch if expected_lanes == 1 else DealtBatch)


def test_int8_in_lanes_gives_the_same_scores(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "MIN_TOKENS", 1)
    scorer = Scorer.load(model_path, device="cpu", precision="int8")
    group = requests(random.Random(5), 4, documents=9)
    plain = packed(scorer, group)
    scorer.lanes = Lanes(3, 3)
    assert packed(scorer, group) == [pytest.approx(logits, abs=1e-4) for logits in plain]


@pytest.mark.parametrize(("cores", "parts", "width"), [(4, 2, 2), (4, 4, 1), (2, 4, 1)])
def test_lanes_share_the_cores_and_leave_the_number_of_threads_alone(
    scorer: Scorer, cores: int, parts: int, width: int
) -> None:
    seen: list[tuple[str, int]] = []
    together = threading.Barrier(parts)

    def forward(batch: PackedBatch) -> torch.Tensor:
        seen.append((threading.current_thread().name, torch.get_num_threads()))
        together.wait(300)
        return torch.zeros(batch.shape.documents)

    before, lanes = torch.get_num_threads(), Lanes(4, cores)
    part = scorer.pack([Slice(EncodedRequest([1, 2], [[3]]), 0, 1)])
    assert isinstance(part, PackedBatch)
    assert lanes.run(forward, DealtBatch((), (part,) * parts, tuple((i,) for i in range(parts)))) == [0.0] * parts
    assert [threads for _, threads in seen] == [width] * parts
    assert all(name.startswith("lane") for name, _ in seen)
    fresh: list[int] = []
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *fresh] == [before, before]
    lanes.close()


class Held:
    """A forward pass that notes its threads and waits."""

    def __init__(self, lanes: Lanes, batch: PackedBatch | DealtBatch) -> None:
        self.widths: list[int] = []
        self.go = threading.Event()
        self.thread = threading.Thread(target=lanes.run, args=(self.forward, batch))
        self.thread.start()

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        self.widths.append(torch.get_num_threads())
        self.go.wait(300)
        return torch.zeros(batch.shape.documents)

    def wait(self, parts: int) -> None:
        while len(self.widths) < parts:
            time.sleep(0.001)

    def end(self) -> None:
        self.go.set()
        self.thread.join()


def test_batches_in_lanes_overlap_and_a_part_alone_takes_all_cores_only_if_no_other_runs(scorer: Scorer) -> None:
    lanes, part = Lanes(2, 4), scorer.pack([Slice(EncodedRequest([1, 2], [[3]]), 0, 1)])
    assert isinstance(part, PackedBatch)
    idle: list[bool] = []
    lanes.on_idle = lambda: idle.append(lanes.idle)
    dealt = DealtBatch((), (part, part), ((0,), (1,)))
    wide = Held(lanes, part)
    wide.wait(1)
    assert not lanes.idle
    first = Held(lanes, dealt)
    time.sleep(0.02)
    assert (wide.widths, first.widths) == ([4], [])  # nothing runs beside a pass with all cores
    wide.end()
    first.wait(2)
    assert (first.widths, lanes.idle, idle) == ([2, 2], False, [])
    second = Held(lanes, part)
    while not lanes._waiting:  # it waits for a lane, not for all of them
        time.sleep(0.001)
    assert second.widths == []
    first.go.set()
    second.wait(1)
    first.thread.join()
    assert second.widths in ([2], [4])  # the cores that are free when it starts
    second.end()
    assert lanes.idle
    assert idle
    lanes.close()


def test_a_lane_with_all_cores_is_not_idle(scorer: Scorer) -> None:
    """Two parts of eight lanes share the cores; when one has ended, the next batch may start in its place."""
    lanes, part = Lanes(8, 8), scorer.pack([Slice(EncodedRequest([1, 2], [[3]]), 0, 1)])
    assert isinstance(part, PackedBatch)
    ends = [threading.Event(), threading.Event()]
    started: list[int] = []

    def forward(batch: PackedBatch) -> torch.Tensor:
        started.append(torch.get_num_threads())
        ends[len(started) - 1].wait(300)
        return torch.zeros(batch.shape.documents)

    woken = threading.Event()
    lanes.on_idle = woken.set
    thread = threading.Thread(target=lanes.run, args=(forward, DealtBatch((), (part, part), ((0,), (1,)))))
    thread.start()
    while len(started) < 2:
        time.sleep(0.001)
    assert (started, lanes.idle) == ([4, 4], False)
    ends[0].set()
    assert woken.wait(300)
    assert lanes.idle
    ends[1].set()
    thread.join()
    lanes.close()


class Failing:
    """A model whose forward pass fails on chosen batches, and that counts the passes in flight."""

    def __init__(self, scorer: Scorer, error: Exception, when: Any) -> None:
        self.model, self.error, self.when = scorer.model, error, when
        self.alive: list[weakref.ref[torch.Tensor]] = []
        self.running = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        self.running += 1
        try:
            held = torch.ones(4)
            self.alive.append(weakref.ref(held))
            if self.when(batch):
                raise type(self.error)(*self.error.args)  # a new exception, because a stored one would keep its frames
            return self.model.forward(batch)
        finally:
            self.running -= 1


def test_a_lane_that_fails_waits_for_the_others_and_keeps_nothing(scorer: Scorer) -> None:
    scorer.lanes = Lanes(2, 2)
    first: list[PackedBatch] = []
    failing = Failing(scorer, RuntimeError("a kernel failed"), lambda batch: not first and not first.append(batch))  # type: ignore[func-returns-value]
    scorer.model = failing  # type: ignore[assignment]
    rng = random.Random(3)
    group = requests(rng, 3, words=100)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="a kernel failed"):
            packed(scorer, group)
        assert failing.running == 0
        assert [reference() for reference in failing.alive] == [None] * len(failing.alive)
    finally:
        gc.enable()


def test_out_of_memory_in_a_lane_changes_no_score(scorer: Scorer) -> None:
    rng = random.Random(4)
    group = requests(rng, 3, documents=9)
    plain = packed(scorer, group)
    scorer.lanes = Lanes(2, 2)
    budget = scorer.max_batch_tokens
    error = torch.OutOfMemoryError("DefaultCPUAllocator: not enough memory")
    scorer.model = Failing(scorer, error, lambda batch: batch.shape.documents > 2)  # type: ignore[assignment]
    assert packed(scorer, group) == [pytest.approx(logits, abs=2e-5) for logits in plain]
    assert scorer.max_batch_tokens < budget
