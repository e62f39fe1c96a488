from __future__ import annotations

from reranker.notes import Notes


def test_each_text_is_written_once_up_to_the_limit() -> None:
    lines: list[str] = []
    notes = Notes(lines.append, limit=3)
    notes.add(["a", "b", "a"], "line 1: ")
    notes.add(["b"], "line 2: ")
    assert lines == ["line 1: a", "line 1: b"]
    for i in range(1000):
        notes.add([f"x{i}", "a"])
    assert lines[2:] == ["x0", "3 different notes were written; no more follow"]
    assert len(notes._written) == 4
