"""The pieces of a batch over Ray without a cluster: arguments, an actor's work, rounds of actors."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from deploy import ray_batch
from reranker.batch import cluster, distributed
from reranker.batch.actor import ActorConfig, fingerprint, score
from reranker.batch.cluster import Pool
from reranker.batch.output import Output, PartRecord
from reranker.batch.parts import Part, scan, split_into_parts
from reranker.batch.scoring import Totals
from reranker.errors import FailedError, InputError
from reranker.rankers.source import Source
from reranker.rows.row import Defaults
from reranker.settings import ModelSettings
from reranker.terminal import note
from tests.batch.test_output import PARTS, part_record
from tests.batch.test_scoring import Words
from tests.conftest import free_port, make_model

NOTES = json.dumps({"topk is not read": "a.jsonl line 1: "})


def test_lines_of_a_part_name_file_and_line(tmp_path: Path) -> None:
    values = [{"id": 0, "query": "q", "document": "a b"}, {"id": 1, "query": "refused", "document": "a"}, {"id": 2}]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    [part] = split_into_parts({f"file://{path}": scan(f"file://{path}", 1 << 20)})
    notes: list[str] = []
    good, bad, totals = score(
        Words(), part, Defaults(top_k=1), lambda texts, place: notes.extend(map(place.__add__, texts))
    )
    assert good == [{"file": "in.jsonl", "line": 1, "id": 0, "score": 2.0}]
    assert [(row["file"], row["line"], row["id"]) for row in bad] == [("in.jsonl", 2, 1), ("in.jsonl", 3, 2)]
    assert bad[0]["error"] == "no room"
    assert bad[1]["error"].startswith("query: is required")
    assert totals == Totals(rows=3, bad=2, documents=1, truncated=1)
    assert notes[0] == "in.jsonl line 1: --top-k has no effect on a row with document: its result is one score"


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
        (["data", "nowhere://out"], "cannot use nowhere://out: Protocol not known"),
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


def test_a_resumed_batch_scores_the_rest_and_tells_the_losses_of_all_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text("{}\n{}\n{}\n")
    scored: list[list[int]] = []

    def score_two(unfinished: Sequence[Part], config: ActorConfig, _: Pool) -> Iterator[PartRecord]:
        scored.append([part.number for part in unfinished])
        for part in unfinished[:2]:
            record = replace(part_record(part.number, config.output.batch), bad=part.number % 2, truncated=1)
            config.output.finish(part, record, [], [])
            yield record
        if len(unfinished) > 2:
            raise FailedError("an actor died")

    def run(top_k: int | None = None) -> None:
        files = distributed.find_files([str(path)], str(tmp_path / "out"))
        options = Source(), Defaults(top_k), Pool(), 1
        distributed.run(files, str(tmp_path / "out"), *options, overwrite=False)

    monkeypatch.setattr(cluster, "scan", lambda files, size: {address: scan(address, size) for address in files})
    monkeypatch.setattr(cluster, "score", score_two)
    with pytest.raises(FailedError, match="an actor died"):
        run()
    assert capsys.readouterr().err == "1 file, 3 parts\n"
    run()
    assert scored == [[0, 1, 2], [2]]
    assert capsys.readouterr().err.splitlines() == [
        "1 file, 3 parts, 2 of them finished before",
        "1 row, 1 document in 1.0 s (1 documents/s)",
        f"1 bad row was skipped; see {tmp_path}/out/bad-*.jsonl",
        "3 documents did not fit and were truncated (--max-seq-length)",
        f"{tmp_path}/out: 3 rows, 1 bad, 3 documents",
    ]
    run()
    assert "nothing to do: every part is finished\n" in capsys.readouterr().err
    with pytest.raises(InputError, match="begun with another top_k"):
        run(1)


def test_a_cluster_that_is_not_there_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    address = f"127.0.0.1:{free_port()}"
    with pytest.raises(FailedError, match=f"^no Ray cluster at {address}: .*refused; start one, or --address local$"):
        ray_batch.main([str(tmp_path / "in.jsonl"), str(tmp_path / "out"), "--address", address])


class Rounds:
    """Rounds of actors that finish the given numbers of parts and then die; below 0: they end without an error."""

    def __init__(self, *finish: int) -> None:
        self.finish = list(finish)
        self.given: list[int] = []

    def __call__(self, unfinished: Sequence[Part], *_: object) -> Iterator[dict[str, Any]]:
        self.given.append(len(unfinished))
        finish = self.finish.pop(0)
        yield from (asdict(part_record(part.number)) | {"notes": NOTES} for part in unfinished[: abs(finish)])
        if 0 <= finish < len(unfinished):
            raise ActorDiedError()


@pytest.fixture
def scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rounds], Iterator[PartRecord]]:
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 1})
    config = ActorConfig(ModelSettings(model_device="cpu"), Output("/nowhere"), Defaults(), None)

    def start(rounds: Rounds) -> Iterator[PartRecord]:
        monkeypatch.setattr(cluster, "_round", rounds)
        return cluster.score(PARTS, config, Pool((1, 1), 0, 1))

    return start


def test_what_a_death_left_goes_to_new_actors(scoring: Callable[[Rounds], Iterator[PartRecord]]) -> None:
    rounds = Rounds(0, 0, 0, 1, 0, 0, 0, 1, 1)
    assert [found.part for found in scoring(rounds)] == [0, 1, 2]
    assert rounds.given == [3, 3, 3, 3, 2, 2, 2, 2, 1]


def test_deaths_without_a_part_between_them_end_a_batch(scoring: Callable[[Rounds], Iterator[PartRecord]]) -> None:
    found = scoring(Rounds(1, 0, 0, 0, 0))
    assert next(found).part == 0
    with pytest.raises(
        FailedError, match=r"with 2 parts in each of 4 rounds, the first from line 2 of a\.jsonl \(Actor"
    ):
        next(found)


def test_parts_that_ray_forgets_are_told(scoring: Callable[[Rounds], Iterator[PartRecord]]) -> None:
    with pytest.raises(FailedError, match="Ray lost 1 parts; run the same command again"):
        list(scoring(Rounds(-2)))


def test_a_note_of_several_actors_is_written_once(
    scoring: Callable[[Rounds], Iterator[PartRecord]], capsys: pytest.CaptureFixture[str]
) -> None:
    note.cache_clear()
    assert len(list(scoring(Rounds(3)))) == 3
    assert capsys.readouterr().err == "note: a.jsonl line 1: topk is not read\n"
