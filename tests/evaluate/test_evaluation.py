"""`evaluate` on folders so small that every measure is computed by hand.

The service scores by shared words (tests/fake.py), so the order after reranking is known as well.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from reranker.errors import FailedError, InputError
from reranker.evaluate.bm25 import candidates, words
from reranker.evaluate.measures import measure, parse_measures
from reranker.rankers.client import Client
from reranker.rankers.ranker import Scored
from reranker.types import RerankRequest
from tests.cli.command import COMMAND, cli, environment, write_lines
from tests.cli.test_rank import FAKE, url
from tests.conftest import Server, Start

# Shared words with "red fox jumps" are 0, 1, 2, 3; with "blue sea" 2, 0.
CORPUS = {
    "d0": "nothing here",
    "d1": "red house",
    "d2": "red fox",
    "d3": "red fox jumps",
    "e0": "blue sea",
    "e1": "sand",
}
QUERIES = {"q1": "red fox jumps", "q2": "blue sea", "q3": "no candidates"}
GRADES = {"q1": {"d3": 2, "d2": 1, "d0": 0}, "q2": {"e0": 1}, "q3": {"e1": 1}}
RUN_FILE = "run.txt"
RUN = {"q1": ["d0", "d1", "d2", "d3"], "q2": ["e1", "e0"]}


@pytest.fixture(scope="module")
def service(start: Start) -> Server:
    return start(command=FAKE)


def beir(folder: Path) -> None:
    (folder / "qrels").mkdir()
    write_lines(folder / "corpus.jsonl", [{"_id": i, "title": t.split()[0], "text": t} for i, t in CORPUS.items()])
    write_lines(folder / "queries.jsonl", [{"_id": i, "text": t} for i, t in (QUERIES | {"q9": "not judged"}).items()])
    rows = [f"{q}\t{d}\t{g}" for q, found in GRADES.items() for d, g in found.items()]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")


def trec(folder: Path) -> list[str]:
    (folder / "corpus.tsv").write_text("".join(f"{i}\t{t}\n" for i, t in CORPUS.items()))
    (folder / "queries.tsv").write_text("".join(f"{i}\t{t}\n" for i, t in QUERIES.items()))
    (folder / "qrels.txt").write_text("".join(f"{q} 0 {d} {g}\n" for q, f in GRADES.items() for d, g in f.items()))
    lines = [f"{q} Q0 {d} {i + 1} {1 / (i + 1)} mine\n" for q, found in RUN.items() for i, d in enumerate(found)]
    (folder / "run.txt").write_text("".join(reversed(lines)) + "q9 Q0 d0 1 1.0 mine\n")
    return "--corpus corpus.tsv --queries queries.tsv --qrels qrels.txt --run run.txt".split()


def ndcg(gains: list[int], ideal: list[int]) -> float:
    def dcg(values: list[int]) -> float:
        return sum(value / math.log2(i + 2) for i, value in enumerate(values))

    return dcg(gains) / dcg(ideal)


def test_trec_files_before_and_after(service: Server, tmp_path: Path) -> None:
    files = "--per-query by.csv --plot gain.png --save-run new.txt".split()
    out = cli("evaluate", *trec(tmp_path), *files, "--url", url(service), cwd=tmp_path)
    report: dict[str, Any] = json.loads(out.stdout)
    assert (report["queries"], report["without_candidates"], report["documents"]) == (3, 1, 6)
    first, fake = report["systems"]
    means = {(s["name"], name): found["mean"] for s in (first, fake) for name, found in s["measures"].items()}
    changes = {name: found["difference"] for name, found in fake["measures"].items()}
    assert (report["data"], report["reference"], first["name"], fake["model"]) == (
        "qrels.txt",
        RUN_FILE,
        RUN_FILE,
        "fake",
    )
    name = fake["name"]
    # q1: relevance 0 0 1 2 before, 2 1 0 0 after; q2: 0 1, then 1 0; q3 has no candidates and counts as 0.
    before = [ndcg([0, 0, 1, 2], [2, 1]), ndcg([0, 1], [1]), 0.0]
    assert means[RUN_FILE, "nDCG@10"] == pytest.approx(sum(before) / 3)
    assert means[name, "nDCG@10"] == pytest.approx(2 / 3)
    assert means[RUN_FILE, "MRR@10"] == pytest.approx((1 / 3 + 1 / 2) / 3)
    assert means[name, "MRR@10"] == pytest.approx(2 / 3)
    assert means[RUN_FILE, "R@10"] == means[name, "R@10"] == 2 / 3
    assert changes["R@10"] == {"mean": 0, "low": 0, "high": 0, "p": 1, "better": 0, "equal": 3, "worse": 0}
    ndcg10 = changes["nDCG@10"]
    assert [ndcg10[key] for key in ("better", "equal", "worse")] == [2, 1, 0]
    # Of three queries: the lowest mean of a resample is that of three times q3, and 8 choices of signs exist, of which
    # those of q3 change nothing: 2 of 4 are as far from 0 as the observed one.
    assert (ndcg10["low"], ndcg10["p"]) == (0, 0.5)
    assert ndcg10["mean"] == pytest.approx(2 / 3 - sum(before) / 3)
    with open(tmp_path / "by.csv", encoding="utf-8") as file:
        rows = {row["query"]: row for row in csv.DictReader(file)}
    assert [float(rows[q][f"nDCG@10 {RUN_FILE}"]) for q in QUERIES] == pytest.approx(before, abs=1e-6)
    assert [float(rows[q][f"MRR@10 {name}"]) for q in QUERIES] == [1, 1, 0]
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")
    lines = [line.split() for line in (tmp_path / "new.txt").read_text().splitlines()]
    found = (("q1", ["d3", "d2", "d1", "d0"], [3, 2, 1, 0]), ("q2", ["e0", "e1"], [2, 0]))
    assert [line[:4] for line in lines] == [
        [q, "Q0", d, str(i + 1)] for q, documents, _ in found for i, d in enumerate(documents)
    ]
    # The scores are the model's: the sigmoid of the shared words.
    expected = [1 / (1 + math.exp(-words)) for _, _, shared in found for words in shared]
    assert [float(line[4]) for line in lines] == pytest.approx(expected, abs=1e-6)
    assert {line[5] for line in lines} == {"_".join([*name.split(), "qrels.txt"])}
    examples = report["examples"]
    assert [(e["query"], e["text"], e["reference_top"], e["top"]) for e in examples] == [
        ("q1", "red fox jumps", ["d0", "nothing here"], ["d3", "red fox jumps"]),
        ("q2", "blue sea", ["e1", "sand"], ["e0", "blue sea"]),
    ]
    assert [e["change"] for e in examples] == pytest.approx([1 - before[0], 1 - before[1]])


def test_a_recall_that_reranking_can_change(service: Server, tmp_path: Path) -> None:
    args = [*trec(tmp_path), "--candidates", "3", "--measures", "R@1, R@2"]
    report = json.loads(cli("evaluate", *args, "--url", url(service), cwd=tmp_path).stdout)
    first, fake = (system["measures"] for system in report["systems"])
    # Three candidates of q1 leave d3 out: of its two relevant documents d2 is found, third before and first after.
    assert (first["R@1"]["mean"], fake["R@1"]["mean"]) == pytest.approx((0, (0.5 + 1) / 3))
    assert (first["R@2"]["mean"], fake["R@2"]["mean"]) == pytest.approx((1 / 3, (0.5 + 1) / 3))


def test_a_beir_folder_with_bm25(service: Server, tmp_path: Path) -> None:
    beir(tmp_path)
    args = ("--beir", ".", "--output", "table", "--url", url(service))
    out = cli("evaluate", *args, cwd=tmp_path).stdout.splitlines()
    columns = ["mean", "difference", "95", "%", "interval", "p", "better", "equal", "worse"]
    assert out[0].split() == ["nDCG@10", *columns]
    # BM25 puts d3 and e0 first already, and finds nothing for q3.
    assert out[1].split() == ["bm25", "0.6667", "reference"]
    assert out[2].split()[2:] == ["0.6667", "+0.0000", "[+0.0000,", "+0.0000]", "1.0000", "0", "3", "0"]
    assert out[4].split() == ["MRR@10", *columns]
    # d1, d2, d3 share a word with q1, e0 with q2; documents without a shared word are no candidates.
    data = f"data {tmp_path.name}/test: 3 queries (1 without candidates), 4 documents, first stage bm25"
    assert data in out


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("qrels.txt", "q1 d1 1\n", "qrels.txt line 1 has 3 columns, not 4"),
        ("qrels.txt", "q1 0 d1 x\n", "relevance 'x' is not a whole number"),
        ("qrels.txt", "", "qrels.txt holds no judgements"),
        ("qrels.txt", "q7 0 d1 1\n", "queries.tsv has no text for 1 of 1, the first is query 'q7'"),
        ("run.txt", "q1 Q0 d7 1 1.0 r\n", "corpus.tsv has no text for 1 of 1, the first is document 'd7'"),
        ("run.txt", "q1 Q0 d1 1 1.0 r\nq1 Q0 d1 2 0.5 r\n", "run.txt line 2: d1 is there twice for query q1"),
        ("run.txt", "q8 Q0 d1 1 1.0 r\n", "run.txt ranks no query of qrels.txt"),
        ("queries.tsv", "q1 no tab\n", "queries.tsv line 1 needs an id, a tab and a text"),
        ("queries.tsv", "", "queries.tsv is empty"),
        ("corpus.tsv", "\n", "corpus.tsv is empty"),
        ("corpus.tsv", "id\tabstract\nd1\tx\n", "its columns are abstract: name one text"),
        ("corpus.tsv", "id\ttext\tText\nd1\tx\ty\n", "corpus.tsv has the column 'text' twice"),
        ("corpus.tsv", "id\ttext\tid\nd1\tx\ty\n", "corpus.tsv has the column 'id' twice"),
    ],
)
def test_data_that_does_not_fit_together(file: str, content: str, says: str, tmp_path: Path) -> None:
    args = trec(tmp_path)
    (tmp_path / file).write_text(content)
    assert says in cli("evaluate", *args, "--url", "http://127.0.0.1:9", cwd=tmp_path, code=2).stderr


def test_a_wrong_split_or_measure_is_named(tmp_path: Path) -> None:
    beir(tmp_path)
    assert (
        "there: test, choose with --split"
        in cli("evaluate", "--beir", ".", "--split", "dev", cwd=tmp_path, code=2).stderr
    )
    err = cli("evaluate", "--beir", ".", "--measures", "nDCG@10 foo", cwd=tmp_path, code=2).stderr
    assert "--measures: measure not found: foo" in err


@pytest.mark.parametrize("name", ["P", "R", "RBP", "ERR@10", "Accuracy", "nDCG@10 AP_IA"])
def test_a_measure_that_cannot_be_computed_is_one_line(name: str) -> None:
    with pytest.raises(InputError, match=r"^ir-measures cannot compute .*") as error:
        measure(parse_measures(name), {"q": {"d": 1}}, {"q": {"d": 1.0}})
    assert "\n" not in str(error.value)


@pytest.mark.skipif(shutil.which("perl") is None, reason="ir-measures computes ERR with perl")
def test_only_the_reciprocal_rank_is_called_mrr() -> None:
    """ERR is another measure."""
    ranking = {"1": {"d": 1.0}}
    values = measure(parse_measures("RR@10 MRR@5 RR ERR@10"), {"1": {"d": 1}}, ranking)
    assert list(values) == ["MRR@10", "MRR@5", "RR", "ERR@10"]


def test_ids_with_blanks_are_refused_before_a_run_is_lost(tmp_path: Path) -> None:
    beir(tmp_path)
    lines = [{"_id": i.replace("d3", "d 3"), "text": t} for i, t in CORPUS.items()]
    write_lines(tmp_path / "corpus.jsonl", lines)
    args = ["evaluate", "--beir", ".", "--save-run", "new.txt", "--url", "http://127.0.0.1:9"]
    err = cli(*args, cwd=tmp_path, code=2).stderr
    assert "error: --save-run: the id 'd 3' has a blank, which a TREC run cannot hold; rename it\n" in err


OUTPUTS = ("--per-query", "--plot", "--save-run")
INPUTS = ("corpus.tsv", "queries.tsv", "qrels.txt", "run.txt")


@pytest.mark.parametrize("option", OUTPUTS)
@pytest.mark.parametrize("name", [*INPUTS, "./run.txt", "link.txt", "hard.txt"])
def test_an_output_that_is_an_input_is_refused(option: str, name: str, tmp_path: Path) -> None:
    args = trec(tmp_path)
    (tmp_path / "link.txt").symlink_to("qrels.txt")
    (tmp_path / "hard.txt").hardlink_to(tmp_path / "qrels.txt")
    before = {path: (tmp_path / path).read_bytes() for path in INPUTS}
    err = cli("evaluate", *args, option, name, "--url", "http://127.0.0.1:9", cwd=tmp_path, code=2).stderr
    assert f"error: {option}={name} would replace the input " in err
    assert before == {path: (tmp_path / path).read_bytes() for path in INPUTS}


@pytest.mark.parametrize(
    ("option", "given", "name"),
    [*((option, "old.png", "old.png") for option in OUTPUTS), ("--plot", "old", "old.png")],
)
def test_an_output_that_exists_is_replaced_only_on_request(option: str, given: str, name: str, tmp_path: Path) -> None:
    args = ["evaluate", *trec(tmp_path), option, given, "--url", "http://127.0.0.1:9"]
    (tmp_path / name).write_text("of an earlier run")
    err = cli(*args, cwd=tmp_path, code=2).stderr
    assert err == f"error: {option}={name} exists already; give another name, or --overwrite\n"
    assert "cannot reach" in cli(*args, "--overwrite", cwd=tmp_path, code=1).stderr
    assert (tmp_path / name).read_text() == "of an earlier run", "nothing was scored"


def test_a_run_that_ends_early_says_that_it_keeps_nothing(
    service: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_and_end(client: Client, requests: Iterable[RerankRequest]) -> Iterator[Scored]:
        for request in requests:
            yield Scored([0.5] * len(request.documents), 0)
            raise FailedError("gone")

    monkeypatch.setattr(Client, "rank_many", first_and_end)
    done = cli("evaluate", *trec(tmp_path), "--save-run", "new.txt", "--url", url(service), cwd=tmp_path, code=1)
    lines = done.stderr.splitlines()
    assert lines[-2].endswith(": 1 of 2 queries scored; nothing is kept, the next run starts anew")
    assert lines[-1] == "error: gone"
    assert not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize("pair", [OUTPUTS[:2], OUTPUTS[1:], OUTPUTS[::2]], ids=" ".join)
def test_two_outputs_of_one_name_are_refused(pair: tuple[str, str], tmp_path: Path) -> None:
    args = [*trec(tmp_path), pair[0], "out.png", pair[1], "./out.png", "--url", "http://127.0.0.1:9"]
    err = cli("evaluate", *args, cwd=tmp_path, code=2).stderr
    assert err == f"error: {pair[1]}=./out.png would replace the output of {pair[0]}; name another file\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        *((f"{option} nowhere/a.png", "the folder nowhere does not exist") for option in OUTPUTS),
        *((f"{option} .", "names no file") for option in OUTPUTS),
        ("--save-run new.txt.gz", "outputs are not compressed; leave out .gz"),
        ("--plot a.docx", "docx is no format of a picture"),
        ("--split dev", "--split has no effect"),
        ("--split test", "--split has no effect"),
        ("--measures ,", "--measures names no measure"),
        ("--run again.txt", "--run is given twice"),
    ],
)
def test_what_an_hour_of_scoring_would_be_lost_to_is_said_first(args: str, says: str, tmp_path: Path) -> None:
    given = [*trec(tmp_path), *args.split(), "--url", "http://127.0.0.1:9"]
    err = cli("evaluate", *given, cwd=tmp_path, code=2).stderr
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("option", [*OUTPUTS, "--run", "--measures"])
def test_an_empty_value_is_not_taken_as_none(option: str, tmp_path: Path) -> None:
    beir(tmp_path)
    err = cli("evaluate", "--beir", ".", option, "", "--url", "http://127.0.0.1:9", cwd=tmp_path, code=2).stderr
    assert err.startswith(f"error: {option}")


def test_the_result_is_printed_even_where_a_file_cannot_be_written(service: Server, tmp_path: Path) -> None:
    args = [*trec(tmp_path), "--save-run", "/dev/full", "--url", url(service)]
    done = cli("evaluate", *args, cwd=tmp_path, code=1)
    assert json.loads(done.stdout)["queries"] == 3
    assert done.stderr.endswith("error: cannot write /dev/full: No space left on device\n")


def test_the_files_are_written_even_where_the_result_cannot_be_printed(service: Server, tmp_path: Path) -> None:
    args = [*COMMAND, "evaluate", *trec(tmp_path), "--save-run", "new.txt", "--url", url(service)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            args, cwd=tmp_path, env=environment(), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert done.stderr.endswith("error: cannot write standard output: No space left on device\n")
    assert len((tmp_path / "new.txt").read_text().splitlines()) == 6


def test_a_folder_with_a_part_in_two_forms_says_which_is_read(service: Server, tmp_path: Path) -> None:
    beir(tmp_path)
    (tmp_path / "corpus.csv").write_text("_id,text\nd0,another\n")
    said = cli("evaluate", "--beir", ".", "--url", url(service), cwd=tmp_path).stderr
    assert "note: . holds corpus.jsonl, corpus.csv; corpus.jsonl is read, the others are not\n" in said


@pytest.mark.parametrize(("grades", "idle"), [({"q1": 0, "q2": 0, "q3": -1}, 3), ({"q1": 1, "q2": 0}, 1)])
def test_queries_without_a_relevant_document_are_said(
    grades: dict[str, int], idle: int, service: Server, tmp_path: Path
) -> None:
    args = trec(tmp_path)
    (tmp_path / "qrels.txt").write_text("".join(f"{q} 0 d1 {g}\n" for q, g in grades.items()))
    said = cli("evaluate", *args, "--url", url(service), cwd=tmp_path).stderr
    assert f"judges no document relevant (1 or more) for {idle} of {len(grades)} queries; every measure" in said


def test_chinese_is_cut_into_characters_and_pairs() -> None:
    assert words("GPU 压缩文件, x_1") == ["gpu", "压", "缩", "文", "件", "压缩", "缩文", "文件", "x_1"]
    corpus = {"a": "如何压缩文件", "b": "猫是一种动物", "c": "文学"}
    ranking = candidates(corpus, {"q": "压缩文件"}, 10)
    assert {query: list(found) for query, found in ranking.items()} == {"q": ["a", "c"]}
