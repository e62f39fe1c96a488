"""The journal alone: torn, locked, of another manifest."""

from __future__ import annotations

from pathlib import Path

import pytest

from reranker.batch.journal import Journal
from reranker.errors import InputError
from tests.cli.command import read_lines


def filled(path: Path, count: int) -> bytes:
    with Journal(path, {"model": "m"}, overwrite=False) as journal:
        for i in range(count):
            journal.write(i * 2 + 1, {"id": f"文 {i}", "results": []})
    return journal.partial.read_bytes()


def test_a_journal_torn_anywhere_is_recovered(tmp_path: Path) -> None:
    whole = filled(tmp_path / "out", 2)
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        for tail in (b"", b"\0" * 5, b"\0\n" + whole[-8:]):
            (tmp_path / "out.partial").write_bytes(whole[:cut] + tail)
            complete = sum(end <= cut for end in ends)
            with Journal(tmp_path / "out", {"model": "m"}, overwrite=False) as journal:
                assert (journal.lines, journal.last) == (complete, max(0, complete * 2 - 1)), (cut, tail)
                journal.write(9, {})
            content = (tmp_path / "out.partial").read_bytes()
            assert content == whole[: ends[complete - 1] if complete else 0] + b'{"line": 9}\n'


def test_a_journal_has_one_writer(tmp_path: Path) -> None:
    with Journal(tmp_path / "out", {}, overwrite=False) as journal:
        journal.write(1, {})
        with pytest.raises(InputError, match="being written by another process"):
            Journal(tmp_path / "out", {}, overwrite=True)
    assert len(read_lines(tmp_path / "out.partial")) == 1


def test_a_journal_without_a_line_leaves_nothing(tmp_path: Path) -> None:
    Journal(tmp_path / "out", {}, overwrite=False).close()
    assert list(tmp_path.iterdir()) == []


def test_a_journal_that_cannot_be_read_again_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Journal) -> int:
        raise KeyboardInterrupt

    whole = filled(tmp_path / "out", 2)
    monkeypatch.setattr(Journal, "_whole_bytes", interrupt)
    with pytest.raises(KeyboardInterrupt):
        Journal(tmp_path / "out", {"model": "m"}, overwrite=False)
    assert (tmp_path / "out.partial").read_bytes() == whole
    assert (tmp_path / "out.partial.json").exists()


def test_a_journal_of_unknown_origin_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "out.partial").write_text("mine\n")
    with pytest.raises(InputError, match="begun with something unknown"):
        Journal(tmp_path / "out", {}, overwrite=False)
    assert (tmp_path / "out.partial").read_text() == "mine\n"
