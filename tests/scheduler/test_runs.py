from __future__ import annotations

import asyncio

import pytest

from reranker.scheduler.runs import in_turns, split


@pytest.mark.parametrize(
    ("tokens", "runs"),
    [
        ([3], [(0, 1)]),
        ([11], [(0, 1)]),
        ([5, 5, 1], [(0, 2), (2, 3)]),
        ([5, 11, 5, 5], [(0, 1), (1, 2), (2, 4)]),
        ([1] * 25, [(0, 10), (10, 20), (20, 25)]),
    ],
)
def test_a_run_has_at_most_ten_tokens_or_one_query(tokens: list[int], runs: list[tuple[int, int]]) -> None:
    assert [(run.start, run.stop) for run in split(tokens, 10)] == runs


def test_two_runs_are_in_progress_and_an_error_ends_both() -> None:
    events: list[str] = []

    async def work(run: slice) -> None:
        events.append(f"begin {run.start}")
        try:
            if run.start == 3:
                raise KeyError(run.start)
            await asyncio.sleep(0 if run.start < 2 else 100)
        finally:
            events.append(f"end {run.start}")

    async def main() -> None:
        with pytest.raises(KeyError):
            await in_turns([slice(i, i + 1) for i in range(6)], work)
        await asyncio.sleep(0)

    asyncio.run(main())
    assert events == [
        f"{what} {i}"
        for what, i in zip(
            ["begin", "begin", "end", "begin", "end", "begin", "end", "end"], [0, 1, 0, 2, 1, 3, 3, 2], strict=True
        )
    ]
