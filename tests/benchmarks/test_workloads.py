"""The drawn workload is a pure function of its seed."""

from __future__ import annotations

from benchmarks.workloads import CHARACTERS, drawn, read


def test_a_seed_draws_the_same_requests_every_time_and_another_seed_others() -> None:
    assert drawn(3, 5, 20) == drawn(3, 5, 20) == read("drawn", 5, 20, seed=3)
    assert drawn(3, 5, 20) != drawn(4, 5, 20)
    assert drawn(3, 2, 20) == drawn(3, 5, 20)[:2], "more requests leave the first ones as they are"


def test_drawn_requests_keep_to_their_limits_and_differ() -> None:
    work = drawn(0, 100, 12)
    counts = [len(request["documents"]) for request in work]
    assert len(work) == 100
    assert {1, 12} <= set(counts) <= set(range(1, 13))
    lengths = sorted(len(document) for request in work for document in request["documents"])
    assert CHARACTERS[0] - 5 <= lengths[0] < 200, "a blank at the end is removed"
    assert 1300 < lengths[-1] <= CHARACTERS[1]
    assert len({request["query"] for request in work}) == 100
    texts = " ".join(" ".join(row["documents"]) for row in read("short")).split()
    assert set(work[0]["query"].split()) <= set(texts)


def test_the_files_are_read_from_their_beginning() -> None:
    first, second = read("short", 2, 3)
    assert len(first["documents"]) == len(second["documents"]) == 3
    assert first["query"] == read("short")[0]["query"]
