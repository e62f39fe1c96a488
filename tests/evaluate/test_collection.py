"""The data of `evaluate` as BEIR, MTEB, TREC and pandas write it: every layout gives the same collection."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from reranker.errors import InputError
from reranker.evaluate.collection import beir, read_texts
from reranker.evaluate.judgements import read_grades, read_run
from reranker.evaluate.measures import parse_measures
from reranker.terminal import note
from tests.cli.command import cli, stub

GRADES = {"1": {"12": 2, "d-3": 0}, "2": {"12": 1}}
JUDGED = [(q, d, g) for q, found in GRADES.items() for d, g in found.items()]
TEXTS = {"12": "Title one text", "d-3": "no title", "7": ""}


@pytest.fixture(autouse=True)
def notes() -> None:
    note.cache_clear()


def lines(rows: list[tuple[Any, ...]], mark: str, heading: str = "") -> str:
    return "".join(f"{row}\n" for row in [*([heading] if heading else []), *(mark.join(map(str, r)) for r in rows)])


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write(path: Path, content: str) -> Path:
    data = content.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


QRELS: dict[str, tuple[str, str]] = {
    "trec": ("q.txt", lines([(q, 0, d, g) for q, d, g in JUDGED], " ")),
    "trec with another end": ("q.qrels", lines([(q, "Q0", d, g) for q, d, g in JUDGED], "\t")),
    "trec without an end": ("qrels", lines([(q, 0, d, g) for q, d, g in JUDGED], "  ")),
    "trec, packed": ("q.txt.gz", lines([(q, 0, d, g) for q, d, g in JUDGED], " ")),
    "ms marco": ("q.tsv", lines([(q, 0, d, g) for q, d, g in JUDGED], "\t")),
    "beir": ("q.tsv", lines(JUDGED, "\t", "query-id\tcorpus-id\tscore")),
    "beir without its heading": ("q.tsv", lines(JUDGED, "\t")),
    "beir as text": ("q.txt", lines(JUDGED, "\t", "query-id\tcorpus-id\tscore")),
    "beir with blanks": ("q.tsv", lines(JUDGED, " ", "query-id corpus-id score")),
    "pandas, with its index": (
        "q.csv",
        lines([(i, *row) for i, row in enumerate(JUDGED)], ",", ",query_id,doc_id,relevance"),
    ),
    "pandas, floats": ("q.csv", lines([(f"{q}.0", d, f"{g}.0") for q, d, g in JUDGED], ",", "qid,docid,rel")),
    "another order": ("q.csv", lines([(g, d, q) for q, d, g in JUDGED], ";", "Grade;Passage ID;Query ID")),
    "numbers as ids": (
        "q.jsonl",
        "".join(
            json.dumps({"query-id": int(q), "corpus-id": 12.0 if d == "12" else d, "score": float(g)}) + "\n"
            for q, d, g in JUDGED
        ),
    ),
    "array": ("q.json", json.dumps([{"query-id": q, "corpus-id": d, "score": g} for q, d, g in JUDGED])),
}


@pytest.mark.parametrize("form", QRELS)
def test_judgements_in_every_form(form: str, tmp_path: Path) -> None:
    name, content = QRELS[form]
    assert read_grades(write(tmp_path / name, content), None) == GRADES


def test_judgements_from_the_hub(tmp_path: Path) -> None:
    parquet(tmp_path / "q.parquet", [{"query-id": q, "corpus-id": d, "score": float(g)} for q, d, g in JUDGED])
    assert read_grades(tmp_path / "q.parquet", None) == GRADES


CORPUS = [("12", "Title", "one text"), ("d-3", "", "no title"), ("7", None, "")]
OBJECTS = [{"_id": i, "title": t, "text": x, "metadata": {"url": "u"}} for i, t, x in CORPUS]
CORPORA: dict[str, tuple[str, str]] = {
    "beir": ("c.jsonl", "".join(json.dumps(row) + "\n" for row in OBJECTS)),
    "beir, packed": ("c.jsonl.gz", "".join(json.dumps(row) + "\n" for row in OBJECTS)),
    "array": ("c.json", json.dumps(OBJECTS, indent=1)),
    "numbers as ids": (
        "c.jsonl",
        "".join(
            json.dumps(row | {"_id": {"12": 12, "7": 7.0}.get(str(row["_id"]), row["_id"])}) + "\n" for row in OBJECTS
        ),
    ),
    "lines": ("c.txt", lines(list(TEXTS.items()), "\t")),
    "tsv without a heading": ("c.tsv", lines(list(TEXTS.items()), "\t")),
    "tsv": ("c.tsv", lines([(i, x, t or "") for i, t, x in CORPUS], "\t", "docid\ttext\ttitle")),
    "csv": (
        "c.csv",
        lines([(n, i, t or "", f'"{x}"') for n, (i, t, x) in enumerate(CORPUS)], ",", ",pid,title,passage"),
    ),
    "pandas, floats": (
        "c.csv",
        lines([(f"{i}.0" if i.isdigit() else i, t or "", x) for i, t, x in CORPUS], ",", "id,title,text"),
    ),
}


@pytest.mark.parametrize("form", CORPORA)
def test_texts_in_every_form(form: str, tmp_path: Path) -> None:
    name, content = CORPORA[form]
    assert read_texts(write(tmp_path / name, content), None, None, None) == TEXTS
    assert read_texts(tmp_path / name, None, None, {"7"}) == {"7": ""}


def test_texts_from_the_hub(tmp_path: Path) -> None:
    parquet(tmp_path / "c.parquet", OBJECTS)
    assert read_texts(tmp_path / "c.parquet", None, None, None) == TEXTS


def test_a_quote_in_lines_without_a_heading_is_a_character(tmp_path: Path) -> None:
    path = write(tmp_path / "c.tsv", '1\t"half\n2\tand half"\n \t\n3\t"whole"\ttab\n')
    assert read_texts(path, None, None, None) == {"1": '"half', "2": 'and half"', "3": '"whole"\ttab'}


def test_the_form_of_a_name_that_does_not_tell_it(tmp_path: Path) -> None:
    path = write(tmp_path / "c.dat", '{"_id": 1, "text": "x"}\n')
    assert read_texts(path, "jsonl", None, None) == {"1": "x"}
    with pytest.raises(InputError, match="--input-format"):
        read_texts(path, None, None, None)
    path = write(tmp_path / "c.txt", '{"_id": 1, "text": "x"}\n')
    with pytest.raises(InputError, match="looks like JSON lines: --input-format jsonl"):
        read_texts(path, None, None, None)
    assert read_texts(path, "jsonl", None, None) == {"1": "x"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("q.txt", "1 12 1\n", "line 1 has 3 columns, not 4: query, 0, document, relevance"),
        ("q.txt", "1 0 12 1 x\n", "line 1 has 5 columns, not 4"),
        ("q.txt", "1 0 12 1\n2 0 12\n", "line 2 has 3 columns, not 4"),
        ("q.tsv", "query-id\tcorpus-id\tscore\n1\t12\n", "line 2 has 2 columns, not 3: query-id, corpus-id, score"),
        ("q.csv", "query-id,paper,score\n1,12,1\n", "line 1 has the columns query-id, paper, score, not query-id"),
        ("q.tsv", "1\t12\t0.5\n", "line 1: relevance '0.5' is not a whole number"),
        ("q.tsv", "1\t12\tnan\n", "relevance 'nan' is not a whole number"),
        ("q.jsonl", '{"query-id": null, "corpus-id": "12", "score": 1}\n', "line 1 has no id of a query or"),
        ("q.jsonl", '["1", "12", 1]\n["2", "12", 1]\n', "line 1 is not an object with query-id, corpus-id and score"),
        ("q.jsonl", "1 0 12 1\n", "looks like plain text"),
        ("q.txt", "", "holds no judgements"),
    ],
)
def test_bad_judgements_are_named_with_their_line(name: str, content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        read_grades(write(tmp_path / name, content), None)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("r.jsonl", "{}", "a run is read as TREC writes it, lines of query, Q0, document, rank, score, name"),
        ("r.parquet", "", "a run is read as TREC writes it"),
        ("r.txt", "1 12 0.5\n", "line 1 has 3 columns, not 6: query, Q0, document, rank, score, name"),
        ("r.txt", '{"1": {"12": 0.5}}\n', "line 1 has 3 columns, not 6"),
        ("r.txt", "1 Q0 12 1 nan x\n", "line 1: score 'nan' is not a number"),
    ],
)
def test_a_run_in_another_form_is_one_line(name: str, content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        read_run(write(tmp_path / name, content), None, GRADES)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.csv", "number,text\n1,x\n", "c.csv has no column for the id; its columns are number, text: name one _id"),
        ("c.csv", "id,abstract\n1,x\n", "does not tell which column holds the text; its columns are abstract"),
        ("c.tsv", "id\tabstract\n1\tx\n", "does not tell which column holds the text"),
        ("c.tsv", "id\ttext\n1\n", r"row 1 \(line 2\) has too few columns: 1, not 2"),
        ("c.jsonl", '{"_id": "1", "text": null}\n', 'line 1 needs "_id" and a string "text"'),
        ("c.jsonl", '{"_id": true, "text": "x"}\n', 'line 1 needs "_id"'),
        (
            "c.jsonl",
            '{"_id": 1, "text": "x"}\n{"_id": "1", "text": "y"}\n',
            "line 2: the id '1' is there twice, with anot",
        ),
        ("c.txt", "1 no tab\n", "line 1 needs an id, a tab and a text"),
    ],
)
def test_bad_texts_are_named_with_their_line(name: str, content: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=says):
        read_texts(write(tmp_path / name, content), None, None, None)


@pytest.mark.parametrize("end", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_the_parts_of_a_folder(end: str, tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    names = [tmp_path / f"corpus{end}", tmp_path / f"queries{end}", tmp_path / "qrels" / f"test{end}"]
    for path in names:
        path.touch()
    paths = beir(str(tmp_path), "test")
    assert [paths.corpus, paths.queries, paths.qrels] == names
    with pytest.raises(InputError, match=r"dev\.tsv does not exist; there: test, choose with --split"):
        beir(str(tmp_path), "dev")


# As a command


def evaluated(tmp_path: Path, code: int = 0, *args: str) -> tuple[dict[str, Any], str]:
    with stub() as service:
        done = cli("evaluate", "--beir", ".", *args, "--url", service.url, cwd=tmp_path, code=code)
    return json.loads(done.stdout or "{}"), done.stderr


def folder(tmp_path: Path, qrels: str) -> None:
    (tmp_path / "qrels").mkdir(exist_ok=True)
    parquet(
        tmp_path / "corpus.parquet",
        [{"_id": 12, "title": "a", "text": "red fox"}, {"_id": 13, "title": "", "text": "sea"}],
    )
    write(tmp_path / "queries.csv", "id,query\n1.0,red\n2.0,sea\n")
    write(tmp_path / "qrels" / "test.csv", qrels)


def test_a_mixed_collection_and_what_is_said_of_it(tmp_path: Path) -> None:
    folder(tmp_path, ",qid,docid,label\n0,1,12,1.0\n1,2,13,1.0\n2,2,99,1.0\n3,2,13,2.0\n")
    report, said = evaluated(tmp_path, 0, "--measures", "ndcg@10 MRR@10, recall@10 r@10")
    assert (report["queries"], report["documents"], report["without_candidates"]) == (2, 2, 0)
    assert list(report["systems"][0]["measures"]) == ["nDCG@10", "MRR@10", "R@10"]
    assert report["systems"][1]["measures"]["R@10"]["mean"] == 0.75
    assert said.splitlines() == [
        "note: qrels/test.csv judges 1 document twice with another relevance; the last one counts",
        "note: the texts are 'query' of queries.csv",
        "note: ids such as 12.0 are read as 12",
        "note: corpus.parquet lacks 1 of 3 judged documents, the first is '99'; "
        "relevant ones among them count as not found",
    ]


def test_an_encoding_has_no_effect_where_all_is_parquet(tmp_path: Path) -> None:
    parquet(tmp_path / "c.parquet", [{"_id": "1", "text": "a"}])
    parquet(tmp_path / "q.parquet", [{"qid": "1", "docid": "1", "score": 1}])
    args = ("--corpus", "c.parquet", "--queries", "c.parquet", "--qrels", "q.parquet", "--encoding", "gbk")
    err = cli("evaluate", *args, cwd=tmp_path, code=2).stderr
    assert err == "error: --encoding gbk has no effect: Parquet is always UTF-8; leave it out\n"


def test_a_form_that_every_name_tells(tmp_path: Path) -> None:
    folder(tmp_path, "qid,docid,label\n1,12,1\n")
    assert "--input-format has no effect" in evaluated(tmp_path, 2, "--input-format", "csv")[1]


def test_ids_that_do_not_match_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("reranker.evaluate.evaluation.candidates")  # an index of millions of documents takes minutes
    folder(tmp_path, "qid,docid,label\n1,doc12,1\n")
    said = evaluated(tmp_path, 2)[1]
    assert (
        "corpus.parquet has no text for 1 of 1, the first is judged document 'doc12'; its own first id is '12'" in said
    )
    folder(tmp_path, "qid,docid,label\nq1,12,1\n")
    assert "the first is query 'q1'; its own first id is '1'" in evaluated(tmp_path, 2)[1]


def test_a_run_of_queries_that_are_not_judged(tmp_path: Path) -> None:
    folder(tmp_path, "qid,docid,label\n1,12,1\n")
    write(tmp_path / "r.run.gz", "1 Q0 13 1 2.0 x\n1 Q0 12 2 1.0 x\n5 Q0 12 1 1.0 x\n6 Q0 12 1 1.0 x\n")
    report, said = evaluated(tmp_path, 0, "--run", "r.run.gz")
    assert report["documents"] == 2
    assert "r.run.gz ranks queries that are not judged: 2, the first is '5'; they are left out\n" in said


def test_an_encoding_for_every_file(tmp_path: Path) -> None:
    (tmp_path / "c.csv").write_text("编号,id,内容\n1,12,红色的狐狸\n", encoding="gb18030")
    (tmp_path / "q.txt").write_text("1\t红色\n", encoding="gb18030")
    (tmp_path / "r.txt").write_text("1 0 12 1\n", encoding="gb18030")
    args = ("evaluate", "--corpus", "c.csv", "--queries", "q.txt", "--qrels", "r.txt")
    assert "--encoding gb18030" in cli(*args, "--url", "http://127.0.0.1:9", cwd=tmp_path, code=2).stderr
    with stub() as service:
        done = cli(*args, "--encoding", "gbk", "--url", service.url, cwd=tmp_path)
    assert service.bodies[0]["documents"] == ["红色的狐狸"]
    assert "note: the texts are '内容' of c.csv\n" in done.stderr


@pytest.mark.parametrize("name", ["ndcg@10", "NDCG@10", "nDCG@10"])
def test_a_measure_in_any_case(name: str) -> None:
    assert [str(measure) for measure in parse_measures(f"{name}, nDCG@10 rr@10 MAP p@5")] == [
        "nDCG@10",
        "RR@10",
        "AP",
        "P@5",
    ]
