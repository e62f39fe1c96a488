"""The real application around the real model, which tells at GET /spent how long it spent in forward passes."""

from __future__ import annotations

import time
from typing import Any

from app import create_app, load_scorer
from config import load_settings
from reranker.scheduler.compute import ScorerLike

settings = load_settings()
spent = {"wall": 0.0, "processor": 0.0}
"""Seconds in `score`, without packing or waiting, of its thread alone: hence OMP_NUM_THREADS=1."""


def load() -> ScorerLike:
    """The scorer of the settings, with a clock around its forward passes."""
    scorer = load_scorer(settings)
    score = scorer.score

    def timed(batch: Any) -> list[float]:
        wall, processor = time.perf_counter(), time.thread_time()
        try:
            return score(batch)
        finally:
            spent["wall"] += time.perf_counter() - wall
            spent["processor"] += time.thread_time() - processor

    scorer.score = timed  # type: ignore[method-assign]
    return scorer


app = create_app(settings, load)


@app.get("/spent", include_in_schema=False)
async def get_spent() -> dict[str, float]:
    """Since the start."""
    return spent
