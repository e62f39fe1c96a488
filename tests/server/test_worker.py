"""How many connections a worker takes, by the system's limit on open files."""

from __future__ import annotations

import resource

import pytest

from reranker.server.worker import raise_fd_limit

ENDLESS = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "taken", "raised"),
    [
        (1024, 524_288, 3000, 3256),  # as a shell and systemd have it
        (1024, ENDLESS, 3000, 3256),
        (1_048_576, 1_048_576, 3000, None),  # a container
        (ENDLESS, ENDLESS, 3000, None),
        (1024, 2048, 1792, 2048),
        (1024, 1024, 768, None),
        (100, 100, 1, None),
    ],
)
def test_room_for_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, taken: int, raised: int | None
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.append(new))
    assert raise_fd_limit(3000) == taken
    assert limits == ([] if raised is None else [(raised, hard)])
