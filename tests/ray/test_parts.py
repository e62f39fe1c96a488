"""The pieces of a batch without a cluster: cuts, rows, scores and the output folder."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from ray.exceptions import ActorDiedError

from deploy import ray_batch
from reranker.batch import cluster, store
from reranker.batch import part_rows as reading
from reranker.batch.actor import Job, fingerprint, score
from reranker.batch.output import Output, Record
from reranker.batch.parts import Part, cut, scan
from reranker.errors import FailedError, InputError, InvalidRequestError, RerankError
from reranker.notes import Notes
from reranker.rankers.ranker import Scored
from reranker.rows.groups import Row
from reranker.rows.row import request_of
from reranker.settings import ModelSettings
from reranker.types import RerankRequest
from tests.conftest import free_port, make_model
from tests.request.bodies import ROWS


def parts_of(path: Path, size: int) -> list[Part]:
    address = f"file://{path}"
    return cut({address: scan(address, size)})


def read(path: Path, size: int) -> list[Row]:
    return [row for part in parts_of(path, size) for row in reading.rows(part, None, None)]


LINES = [b"", b"a", b"bc\r", b"x" * 40, b"", b"def", b"y" * 9, b"", b"last"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_are_cut_at_their_ends_and_numbered(tmp_path: Path, end: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "in.jsonl"
    whole = b"\n".join(LINES) + end
    path.write_bytes(whole)
    for chunk, size in itertools.product((1, 3, 7, 1000), range(1, 90)):
        monkeypatch.setattr("reranker.batch.parts._CHUNK", chunk)
        parts = parts_of(path, size)
        assert b"".join(whole[part.start : part.stop] for part in parts) == whole
        for part, after in itertools.pairwise(parts):
            assert part.stop == after.start
            assert whole[part.start : part.stop].endswith(b"\n")
            assert part.stop - part.start >= size  # and no more than one line above
            assert b"\n" not in whole[part.start + size - 1 : part.stop - 1]
        assert [part.first for part in parts] == [whole[: part.start].count(b"\n") + 1 for part in parts]


@pytest.mark.parametrize("group", [1, 4, 7, 100])
def test_rows_of_parquet_are_all_there_once(tmp_path: Path, group: int) -> None:
    path = tmp_path / "in.parquet"
    table = pyarrow.Table.from_pylist([{"id": i, "query": f"q{i}", "documents": [f"d{i}"]} for i in range(100)])
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    for size in (1, 100, 300, 1000, 1 << 20):
        found = read(path, size)
        assert [(row.number, row.id) for row in found] == [(i + 1, i) for i in range(100)]
        assert all(row.request == RerankRequest(f"q{row.id}", [f"d{row.id}"]) for row in found)
    assert len(parts_of(path, 1)) == 100
    assert len(parts_of(path, 1 << 20)) == 1


def test_a_line_without_end_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_LONGEST", 100)
    path = tmp_path / "in.jsonl"
    good = json.dumps({"query": "q", "documents": ["d"]})
    path.write_text("\n".join([good, "x" * 450, good, "y" * 100]))
    assert [(row.number, bool(row.request), "longer than" in row.error) for row in read(path, 1 << 20)] == [
        (1, True, False),
        (2, False, True),
        (3, True, False),
        (4, False, True),
    ]


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    for name, row, says in (
        ("a", {"query": "q", "text": "t"}, "has the columns query, text; a batch needs query and documents"),
        ("b", {"query": "q", "document": "d", "id": 0.5}, "column id is of type double"),
    ):
        path = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
        with pytest.raises(InputError, match=says):
            parts_of(path, 1000)
    (tmp_path / "c.parquet").write_text("not parquet")
    with pytest.raises(InputError, match=r"cannot read file://.*c\.parquet: "):
        parts_of(tmp_path / "c.parquet", 1000)


class Words:
    """A ranker: the score of a document is its number of words; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[RerankRequest] = []

    facts: dict[str, str] = {}  # noqa: RUF012

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        for request in requests:
            self.asked.append(request)
            if request.query == "refused":
                yield InvalidRequestError("no room")
            else:
                yield Scored([float(len(document.split())) for document in request.documents], 1)


def test_pairs_of_one_query_share_a_request(tmp_path: Path) -> None:
    values: list[Any] = [
        {"id": 0, "query": "q", "document": "a b"},
        {"id": 1, "query": "q", "document": {"text": "a"}},
        {"id": 2, "query": "q", "document": "a b c", "instruction": "i"},
        {"id": 3, "query": "q", "document": None},
        {"id": 4, "query": "refused", "document": "a"},
        {"id": 5, "query": "refused", "document": "b"},
        {"id": 6, "query": "q", "documents": ["a", "a b"], "top_k": 1},
        {"id": 7, "query": "q", "document": "a"},
    ]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    ranker = Words()
    found = score(ranker, iter(read(path, 1 << 20)))
    assert [request.documents for request in ranker.asked] == [
        ["a b", "a"],
        ["a b c"],
        ["a", "b"],
        ["a", "a b"],
        ["a"],
    ]
    assert found.results == [
        (1, {"id": 0, "score": 2.0}),
        (2, {"id": 1, "score": 1.0}),
        (3, {"id": 2, "score": 3.0}),
        (7, {"id": 6, "results": [{"index": 1, "score": 2.0}]}),
        (8, {"id": 7, "score": 1.0}),
    ]
    assert sorted(number for number, _ in found.bad) == [4, 5, 6]
    assert {row["error"] for number, row in found.bad if number > 4} == {"no room"}
    assert (found.documents, found.truncated) == (6, 4)


def test_a_row_over_ray_means_what_a_body_means(tmp_path: Path) -> None:
    """JSON lines and Parquet, whose absent values are nulls."""
    for name in ("in.jsonl", "in.parquet"):
        path, values = tmp_path / name, ROWS
        if name == "in.jsonl":
            path.write_text("".join(json.dumps(value) + "\n" for value in values))
        else:
            values = [row for row in ROWS if all(isinstance(d, str) for d in row.get("documents") or row["texts"])]
            values = [{n: v for n, v in row.items() if not (n in NUMBERS and isinstance(v, str))} for row in values]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values, schema=SCHEMA), path)
        found = read(path, 1 << 20)
        assert [row.error for row in found] == [""] * len(values)
        for row, value in zip(found, values, strict=True):
            expected = request_of(value, None, None)
            assert (row.request, row.top_k, row.warnings) == (expected.request, expected.top_k, expected.warnings)


NUMBERS = ("top_k", "top_n", "max_tokens_per_doc", "max_chunks_per_doc", "max_chunk_per_doc")
SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("query", "instruction", "instruct", "model")]
    + [(name, pyarrow.list_(pyarrow.string())) for name in ("documents", "texts")]
    + [(name, pyarrow.float64()) for name in NUMBERS]
    + [("truncate", pyarrow.bool_())]
)


def test_what_is_not_read_is_noted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(reading, "NOTES", Notes(said.append))
    row = {"id": 1, "query": "q", "documents": ["d"], "topk": 3, "lang": "en"}
    (tmp_path / "in.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    read(tmp_path / "in.jsonl", 1)
    assert said == ["in.jsonl line 1: topk is not read; did you mean top_k?", "in.jsonl line 1: lang is not read"]
    said.clear()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / "in.parquet")
    read(tmp_path / "in.parquet", 1)
    assert said == ["in.parquet: the column topk is not read", "in.parquet: the column lang is not read"]


def test_the_name_of_a_column_cannot_command_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = {"query": "q", "documents": ["d"], "a\x1b[2Jb": 1}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    read(tmp_path / "in.parquet", 1)
    assert capfd.readouterr().err == "in.parquet: the column a\N{REPLACEMENT CHARACTER}[2Jb is not read\n"


def test_pairs_that_may_not_be_truncated_fail_alone(tmp_path: Path) -> None:
    values = [{"id": i, "query": "q", "document": "d", "truncate": False} for i in range(2)]
    values += [{"id": i, "query": "q", "document": "d", "max_tokens_per_doc": 1 + i // 4} for i in range(2, 6)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    ranker = Words()
    score(ranker, iter(read(path, 1 << 20)))
    assert [(len(r.documents), r.truncate, r.max_tokens_per_doc) for r in ranker.asked] == [
        (1, False, None),
        (1, False, None),
        (2, True, 1),
        (2, True, 2),
    ]


PARTS = [Part(i, "file:///a.jsonl", "a.jsonl", i, i + 1, i + 1) for i in range(3)]


def record(part: int, batch: str = "", weights: str = "w") -> Record:
    return Record(part, batch, 1, 0, 1, 0, weights, "actor", 1, 0.0, 1.0, 0.5)


def test_a_part_counts_when_its_record_and_its_rows_are_there(tmp_path: Path) -> None:
    output = Output(str(tmp_path / "out"))
    assert output.begin({"model": "m"}, PARTS, overwrite=False) == {}
    for part in PARTS:
        output.finish(part, record(part.number, output.batch), [{"line": 1}], [{"line": 2}])
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
    old.finish(PARTS[0], record(0, old.batch), [{"line": 1}], [])
    assert new.record(PARTS[0]) is None
    assert new.begin({"top_k": 2}, PARTS, overwrite=False) == {}


def test_a_row_that_is_good_the_second_time_is_not_bad_as_well(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    output.begin({}, PARTS, overwrite=False)
    output.folder.write("bad-000000.jsonl", b'{"line": 1}\n')  # and then the actor died
    output.finish(PARTS[0], record(0, output.batch), [{"line": 1}], [])
    assert sorted(path.name for path in tmp_path.glob("*0.jsonl")) == ["part-000000.jsonl"]


def test_parts_of_two_models_are_refused(tmp_path: Path) -> None:
    output = Output(str(tmp_path))
    output.begin({}, PARTS, overwrite=False)
    output.finish(PARTS[0], record(0, output.batch, "one"), [], [])
    output.finish(PARTS[1], record(1, output.batch, "two"), [], [])
    with pytest.raises(InputError, match="scored with 2 different models"):
        output.begin({}, PARTS, overwrite=False)


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
    pickle.loads(sent).finish(PARTS[0], record(0), [], [])
    assert (tmp_path / "out" / "_done" / "000000.json").exists()


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedError, match=r"cannot write .*file/out/_batch\.json: Not a directory"):
        Output(str(tmp_path / "file" / "out")).begin({}, PARTS, overwrite=False)


def test_the_same_name_with_other_weights_has_another_fingerprint(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", layers=1)
    before = fingerprint(str(path), None)
    weights = path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint(str(path), None) != before


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["none.jsonl", "out"], "none.jsonl: no such file, and no folder or pattern with"),
        (["data", "data/out"], "data/out lies in the input"),
        (["data/a.jsonl", "data"], "data lies in the input, or the input in it"),
        (["data/b.csv", "out"], "b.csv ends with none of .jsonl, .ndjson, .parquet"),
        (["data", "out", "--actors", "4,2"], "the first number must not be above the second"),
        (["data", "out", "--gpus", "-1"], "is not a number of GPUs"),
        (["data", "out", "--url", "http://h"], "unrecognized arguments"),
        (["nowhere://a", "out"], "cannot read nowhere://a: Protocol not known"),
    ],
)
def test_wrong_arguments_are_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], says: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text("")
    (tmp_path / "data" / "b.csv").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as error:
        ray_batch.main(args)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cluster_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(FailedError, match=f"^no Ray cluster at {address}: .*refused; start one, or --address local$"):
        ray_batch.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--address", address])


def test_a_folder_and_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "_done").mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.ndjson", "_d.jsonl", ".e.jsonl", "_done/f.jsonl"):
        (tmp_path / name).write_text("")
    assert len(store.find(str(tmp_path), (".jsonl", ".ndjson"))) == 3
    assert len(store.find(f"{tmp_path}/[ab].jsonl", (".jsonl",))) == 2


class Rounds:
    """Rounds of actors that finish so many parts each and then die; a number below 0: they end without a word."""

    def __init__(self, *finish: int) -> None:
        self.finish = list(finish)
        self.given: list[int] = []

    def __call__(self, left: Sequence[Part], *_: object) -> Iterator[dict[str, Any]]:
        self.given.append(len(left))
        finish = self.finish.pop(0)
        yield from (record(part.number).row() for part in left[: abs(finish)])
        if 0 <= finish < len(left):
            raise ActorDiedError()


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rounds], Iterator[Record]]:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1})
    job = Job(ModelSettings(model_device="cpu"), Output("/nowhere"), None, None, None)

    def start(rounds: Rounds) -> Iterator[Record]:
        monkeypatch.setattr(cluster, "_round", rounds)
        return cluster.score(PARTS, job, (1, 1), 0, 1)

    return start


def test_what_a_death_left_goes_to_new_actors(scoring: Callable[[Rounds], Iterator[Record]]) -> None:
    rounds = Rounds(0, 0, 0, 1, 0, 0, 0, 1, 1)
    assert [found.part for found in scoring(rounds)] == [0, 1, 2]
    assert rounds.given == [3, 3, 3, 3, 2, 2, 2, 2, 1]


def test_deaths_without_a_part_between_them_end_a_batch(scoring: Callable[[Rounds], Iterator[Record]]) -> None:
    found = scoring(Rounds(1, 0, 0, 0, 0))
    assert next(found).part == 0
    with pytest.raises(
        FailedError, match=r"with 2 parts in each of 4 rounds, the first from line 2 of a\.jsonl \(Actor"
    ):
        next(found)


def test_parts_that_ray_forgets_are_told(scoring: Callable[[Rounds], Iterator[Record]]) -> None:
    with pytest.raises(FailedError, match="Ray lost 1 parts; run the same command again"):
        list(scoring(Rounds(-2)))
