from __future__ import annotations

from reranker.notes import Notes


def test_each_text_is_said_once_and_only_so_many_of_them() -> None:
    said: list[str] = []
    notes = Notes(said.append, limit=3)
    notes.add(["a", "b", "a"], "line 1: ")
    notes.add(["b"], "line 2: ")
    assert said == ["line 1: a", "line 1: b"]
    for i in range(1000):
        notes.add([f"x{i}", "a"])
    assert said[2:] == ["x0", "3 different notes were written; no more follow"]
    assert len(notes._said) == 4
