"""The output folder of many parts, and the files of a store."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from reranker.batch import store
from reranker.batch.output import Output, PartRecord
from reranker.batch.parts import Part
from reranker.errors import FailedError, InputError

PARTS = [Part(i, "file:///a.jsonl", "a.jsonl", i, i + 1, i + 1) for i in range(3)]


def part_record(part: int, batch: str = "", weights: str = "w") -> PartRecord:
    return PartRecord(part, batch, 1, 0, 1, 0, weights, "actor", 1, 0.0, 1.0, 0.5)


def test_a_part_counts_when_its_record_and_its_rows_are_there(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    assert output.begin({"model": "m"}, PARTS, overwrite=False) == {}
    for part in PARTS:
        output.finish(part, part_record(part.number, output.batch), [{"line": 1}], [{"line": 2}])
    assert set(output.begin({"model": "m"}, PARTS, overwrite=False)) == {0, 1, 2}
    half = tmp_path / "out" / "_done" / "000000.json"
    half.write_bytes(half.read_bytes()[:9])
    (tmp_path / "out" / "part-000001.jsonl").unlink()
    assert set(output.begin({"model": "m"}, PARTS, overwrite=False)) == {2}
    assert output.record(PARTS[0]) is None
    with pytest.raises(InputError, match="begun with another model"):
        output.begin({"model": "n"}, PARTS, overwrite=False)
    assert output.begin({"model": "n"}, PARTS, overwrite=True) == {}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_batch.json", "_done"]


def test_what_an_actor_of_another_batch_finishes_does_not_count(tmp_path: Path) -> None:
    old, new = Output(str(tmp_path)), Output(str(tmp_path))
    old.begin({"top_k": 1}, PARTS, overwrite=False)
    new.begin({"top_k": 2}, PARTS, overwrite=True)
    old.finish(PARTS[0], part_record(0, old.batch), [{"line": 1}], [])
    assert new.record(PARTS[0]) is None
    assert new.begin({"top_k": 2}, PARTS, overwrite=False) == {}


def test_a_row_that_is_good_the_second_time_is_not_bad_as_well(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    output.begin({}, PARTS, overwrite=False)
    (tmp_path / "bad-000000.jsonl").write_bytes(b'{"line": 1}\n')  # and then the actor died
    output.finish(PARTS[0], part_record(0, output.batch), [{"line": 1}], [])
    assert sorted(path.name for path in tmp_path.glob("*0.jsonl")) == ["part-000000.jsonl"]


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    output.begin({}, PARTS, overwrite=False)
    output.finish(PARTS[0], part_record(0, output.batch, "one"), [], [])
    output.finish(PARTS[1], part_record(1, output.batch, "two"), [], [])
    with pytest.raises(InputError, match="scored with 2 different models"):
        output.begin({}, PARTS, overwrite=False)


def test_the_last_run_deletes_the_drafts_of_killed_processes(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    output.begin({}, PARTS[:1], overwrite=False)
    output.finish(PARTS[0], part_record(0, output.batch), [], [])
    for folder in (tmp_path, tmp_path / "_done"):
        (folder / "_draft-0").write_bytes(b"{")
    output.close([part_record(0, output.batch)])
    assert not list(tmp_path.rglob("_draft-*"))


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "part-000000.jsonl").write_text("precious")
    with pytest.raises(InputError, match=r"holds part-000000\.jsonl and was begun by no batch"):
        Output(str(tmp_path)).begin({}, PARTS, overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["part-000000.jsonl"]


def test_a_folder_is_the_same_one_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sent = pickle.dumps(Output("out"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pickle.loads(sent).finish(PARTS[0], part_record(0), [], [])
    assert (tmp_path / "out" / "_done" / "000000.json").exists()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedError, match=r"cannot write .*file/out/_batch\.json: Not a directory"):
        Output(str(tmp_path / "file" / "out")).begin({}, PARTS, overwrite=False)


def test_a_folder_and_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "_done").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.ndjson", "_d.jsonl", ".e.jsonl", "_done/f.jsonl"):
        (tmp_path / name).write_text("")
    assert len(store.find(str(tmp_path), (".jsonl", ".ndjson"))) == 3
    assert len(store.find(f"{tmp_path}/[ab].jsonl", (".jsonl",))) == 2
