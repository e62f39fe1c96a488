from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from reranker.server import folder


def test_what_is_used_stays_and_what_was_left_goes(tmp_path: Path) -> None:
    used, lock = folder.make(str(tmp_path))
    left, other = folder.make(str(tmp_path))
    os.close(other)  # as its last process ends
    made, third = folder.make(str(tmp_path))
    assert sorted(map(str, tmp_path.iterdir())) == sorted([used, made])
    assert left not in (used, made)
    os.close(lock)
    folder.remove(used)
    folder.remove(made)
    assert list(map(str, tmp_path.iterdir())) == [made]
    os.close(third)


@pytest.mark.parametrize("locked", [False, True])
def test_a_folder_that_another_service_removes_at_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locked: bool
) -> None:
    """It looks for what nobody uses while this one has made its folder and does not hold it yet."""
    mkdtemp, hold, thieves = tempfile.mkdtemp, folder.hold, [1]

    def stolen(**options: str) -> str:
        made = mkdtemp(**options)
        if thieves and not locked:
            thieves.pop()
            shutil.rmtree(made)
        return made

    def late(made: str) -> int:
        lock = hold(made)
        if thieves and locked:  # between its opening and its lock
            thieves.pop()
            shutil.rmtree(made)
        return lock

    monkeypatch.setattr(tempfile, "mkdtemp", stolen)
    monkeypatch.setattr(folder, "hold", late)
    made, lock = folder.make(str(tmp_path))
    assert list(map(str, tmp_path.iterdir())) == [made]
    os.close(lock)


def test_a_place_where_nothing_stays_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stolen(made: str) -> int:
        shutil.rmtree(made)
        raise FileNotFoundError(made)

    monkeypatch.setattr(folder, "hold", stolen)
    with pytest.raises(OSError, match="vanish"):
        folder.make(str(tmp_path))
