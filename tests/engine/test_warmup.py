from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch

from reranker import Scorer
from reranker.engine import warmup
from reranker.engine.budget import MIN_BATCH_TOKENS
from reranker.engine.device import Memory
from reranker.engine.lanes import DealtBatch
from reranker.engine.scorer import Batch
from reranker.engine.warmup import BATCH_SECONDS, MAX_BATCH_TOKENS, Rate, choose_budget

GIB = 1 << 30


@pytest.mark.parametrize(
    ("tokens_per_second", "free", "requested", "budget"),
    [
        (10_000, 8 * GIB, None, 10_000 * BATCH_SECONDS),  # limited by speed
        (10_000, GIB >> 10, None, 0.8 * 1024),  # limited by memory
        (100, GIB, None, MIN_BATCH_TOKENS),
        (1e9, 1024 * GIB, None, MAX_BATCH_TOKENS),
        (10_000, GIB, 300, 300),
    ],
)
def test_the_budget_is_limited_by_speed_and_memory(
    tokens_per_second: float, free: int, requested: int | None, budget: float
) -> None:
    memory = Memory(total=free, allowed=free, used=0)
    assert choose_budget(Rate(tokens_per_second, 1024.0), memory, requested) == max(
        int(budget), 0 if requested else MIN_BATCH_TOKENS
    )


def test_two_passes_at_a_time_share_the_memory() -> None:
    memory = Memory(total=4 * GIB >> 10, allowed=4 * GIB >> 10, used=0)
    budgets = [choose_budget(Rate(1e9, 1024.0), memory, None, passes) for passes in (1, 2)]
    assert budgets == [int(0.8 * 4096), int(0.4 * 4096)]


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> Scorer:
    """A scorer without lanes, whatever this machine measures."""
    scorer = Scorer.load(model_path, device="cpu", precision="float32")
    scorer.lanes = None
    return scorer


@pytest.mark.parametrize(
    ("cores", "seconds", "chosen"),
    [
        (1, {1: 1.0}, None),
        (2, {1: 1.0, 2: 0.6}, 2),
        (2, {1: 1.0, 2: 0.99}, None),
        (8, {1: 1.0, 2: 0.7, 4: 0.6, 8: 0.7}, 4),
        (8, {1: 1.0, 2: 0.7, 4: 0.6, 8: 0.5}, 8),
        (6, {1: 1.0, 2: 0.7, 4: 0.6, 6: 0.5}, 6),
        (8, {1: 9.0, 8: 5.0}, 8),
        (8, {1: 9.0, 8: 9.0}, None),
    ],
)
def test_as_many_lanes_as_are_fastest(
    loaded: Scorer, monkeypatch: pytest.MonkeyPatch, cores: int, seconds: dict[int, float], chosen: int | None
) -> None:
    scorer = copy.copy(loaded)
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)

    delays = itertools.cycle([0.0, 0.0, 0.0, 5.0, 5.0, 5.0])  # of another process: turns escape it, blocks would not

    def measure(scorer: Scorer, batch: Batch) -> Rate:
        if scorer.lanes:  # the measured batch must use the lanes in question
            assert isinstance(batch, DealtBatch)
            assert len(batch.parts) == scorer.lanes.count
        return Rate(batch.tokens / (next(delays) + seconds[scorer.lanes.count if scorer.lanes else 1]), 1.0)

    monkeypatch.setattr(warmup, "measure", measure)
    monkeypatch.setattr(warmup, "_TURNS_SECONDS", 100.0)  # three turns, however slow the machine is
    documents = max(2 * cores, 8)
    warmup.choose_lanes(scorer, documents, Rate(warmup.warm_up_batch(scorer, documents).tokens / seconds[1], 1.0))
    assert (scorer.lanes.count if scorer.lanes else None) == chosen
