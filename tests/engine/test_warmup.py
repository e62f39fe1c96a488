from __future__ import annotations

import pytest

from reranker.engine.budget import MIN_BATCH_TOKENS
from reranker.engine.device import Memory
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
