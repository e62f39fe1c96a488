from __future__ import annotations

import os
from pathlib import Path

import pytest

from reranker.cgroup import cores, memory_limit


@pytest.fixture(autouse=True)
def _sixteen_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)


def write(file: Path, content: str) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(content)


@pytest.mark.parametrize(
    ("content", "expected"),
    [("200000 100000\n", 2), ("250000 100000", 2), ("50000 100000", 1), ("6400000 100000", 16), ("max 100000\n", 16)],
)
def test_the_cpu_quota_of_v2(tmp_path: Path, content: str, expected: int) -> None:
    write(tmp_path / "cpu.max", content)
    assert cores(tmp_path) == expected


@pytest.mark.parametrize(("quota", "expected"), [("300000", 3), ("-1", 16)])
def test_the_cpu_quota_of_v1(tmp_path: Path, quota: str, expected: int) -> None:
    write(tmp_path / "cpu" / "cpu.cfs_quota_us", f"{quota}\n")
    write(tmp_path / "cpu" / "cpu.cfs_period_us", "100000\n")
    assert cores(tmp_path) == expected


@pytest.mark.parametrize("content", [None, "", "nonsense", "1 0", "x y"])
def test_an_unreadable_quota_limits_nothing(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        write(tmp_path / "cpu.max", content)
    assert cores(tmp_path) == 16


def test_all_processors_count_on_a_system_without_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    assert cores(tmp_path) == 5
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cores(tmp_path) == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"memory.max": "4294967296\n"}, 1 << 32),
        ({"memory.max": "max\n"}, None),
        ({"memory/memory.limit_in_bytes": "1073741824\n"}, 1 << 30),
        ({"memory.max": "1024", "memory/memory.limit_in_bytes": "2048"}, 1024),
        ({"memory.max": "nonsense"}, None),
        ({}, None),
    ],
)
def test_the_memory_limit(tmp_path: Path, files: dict[str, str], expected: int | None) -> None:
    for name, content in files.items():
        write(tmp_path / name, content)
    assert memory_limit(tmp_path) == expected
