"""`batch` with inputs other than JSON lines: the same rows give the same requests and results, and a resume goes on."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.cli.command import cli, read_lines, stub, write_lines

ROWS: list[dict[str, Any]] = [
    {"id": "a", "query": "q1", "documents": ["x", "y, z\n"], "top_k": 1, "instruction": "i"},
    {"id": "b", "query": "q2", "documents": ["", "字"], "top_k": None, "instruction": None},
    {"id": None, "query": "q2", "documents": ["w"], "top_k": None, "instruction": None},
]
PAIRS: list[dict[str, Any]] = [
    {"id": 1, "query": "q1", "document": "x"},
    {"id": 2, "query": "q1", "document": "y, \n z"},
    {"id": None, "query": "q1", "document": ""},
    {"id": 4, "query": "q2", "document": "字"},
]
NAMES = ["in.jsonl", "in.ndjson.gz", "in.json", "in.csv", "in.tsv", "in.csv.gz", "in.parquet"]


def write(path: Path, rows: Sequence[dict[str, Any]], encoding: str = "utf-8") -> None:
    end = path.name.removesuffix(".gz").rpartition(".")[2]
    if end == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
        return
    if end in ("csv", "tsv"):
        file = io.StringIO()
        out = csv.DictWriter(file, list(rows[0]), delimiter="\t" if end == "tsv" else ",")
        out.writeheader()
        cells = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]
        out.writerows(cells)
        text = file.getvalue()
    elif end == "json":
        text = json.dumps(rows, indent=2, ensure_ascii=False)
    else:
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    content = text.encode(encoding)
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)


@pytest.mark.parametrize("name", NAMES)
def test_every_form_of_rows(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, ROWS)
    with stub() as service:
        said = cli("batch", name, "out.jsonl", "--url", service.url, cwd=tmp_path).stderr
    assert sorted(service.bodies, key=lambda body: (body["query"], body["documents"][0] != "")) == [
        {"query": "q1", "documents": ["x", "y, z\n"], "instruction": "i"},
        {"query": "q2", "documents": ["", "字"]},
        {"query": "q2", "documents": ["w"]},
    ]
    unit = "line" if name in NAMES[:2] else "row"
    assert read_lines(tmp_path / "out.jsonl") == [
        {unit: 1, "id": "a", "results": [{"index": 0, "score": 0.5}]},
        {unit: 2, "id": "b", "results": [{"index": 0, "score": 0.5}, {"index": 1, "score": 0.5}]},
        {unit: 3, "id": None, "results": [{"index": 0, "score": 0.5}]},
    ]
    assert said.startswith(f"3 {unit}s, 5 documents in ")


@pytest.mark.parametrize("name", NAMES)
def test_pairs_of_one_query_share_a_request(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, PAIRS)
    answer = [{"index": i, "score": i / 10} for i in range(3)]
    with stub((200, {}, json.dumps(answer).encode())) as service:
        cli("batch", name, "out.jsonl", "--url", service.url, cwd=tmp_path)
    assert sorted(service.bodies, key=lambda body: str(body["query"])) == [
        {"query": "q1", "documents": ["x", "y, \n z", ""]},
        {"query": "q2", "documents": ["字"]},
    ]
    if service.bodies[0]["query"] == "q1":  # the requests are sent side by side
        rows = read_lines(tmp_path / "out.jsonl")
        assert [row["score"] for row in rows] == [0, 0.1, 0.2, 0.5]
        # CSV knows texts only.
        assert [row["id"] for row in rows] == (["1", "2", None, "4"] if "sv" in name else [1, 2, None, 4])


@pytest.mark.parametrize(
    ("heading", "args", "column"),
    [
        ("query,Passage,id", (), "Passage"),
        ("query,内容,id", (), "内容"),
        ("Query,body,content", (), "content"),
        ("query,document,answer", ("--field", "answer"), None),
        ("query,documents,answer", ("--field", "answer"), None),
        ("query,document,text", (), None),
    ],
)
def test_the_column_of_the_document(heading: str, args: tuple[str, ...], column: str | None, tmp_path: Path) -> None:
    columns = heading.split(",")
    wanted = column or (args[1] if args else "document")
    cells = [{"query": "q"}.get(name.lower(), "d" if name == wanted else "no") for name in columns]
    (tmp_path / "in.csv").write_text(f"{heading}\n{','.join(cells)}\n", encoding="gb18030")
    with stub() as service:
        args = ("batch", "in.csv", "out.jsonl", "--url", service.url, "--encoding", "gbk", *args)
        said = cli(*args, cwd=tmp_path).stderr
    assert service.bodies == [{"query": "q", "documents": ["d"]}]
    assert (f"note: the documents are {column!r} of in.csv; choose another with --field\n" in said) == bool(column)


def test_a_key_of_json_lines_by_field(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"query": "q", "passage": "d", "document": "no"}])
    with stub() as service:
        cli("batch", "in.jsonl", "out.jsonl", "--field", "passage", "--url", service.url, cwd=tmp_path)
        args = ("batch", "in.jsonl", "other.jsonl", "--field", "psasage", "--url", service.url)
        err = cli(*args, cwd=tmp_path, code=2).stderr
    assert service.bodies == [{"query": "q", "documents": ["d"]}]
    assert "error: line 1: psasage: is required, because --field names it" in err


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("in.csv", "question,document\na,b\n", "in.csv has no column query; its columns are question, document"),
        ("in.csv", "query,answer\na,b\n", "its columns are answer: name one with --field"),
        ("in.tsv", "query\tdocument\na\n", "row 1 (line 2): this has too few columns: 1, not 2; correct it, or run"),
        ("in.csv", 'query,document\n,"b\n"\n', "row 1 (line 2): query"),
        ("in.csv", "query,documents\na,['b']\n", "row 1 (line 2): documents: must be a JSON array"),
        ("in.json", '[{"query": "q"}]', "row 1: documents"),
        ("in.csv", "query,document,document\nq,a,b\n", "in.csv has the column 'document' twice; rename one"),
        ("in.csv", "query,document,Document\nq,a,b\n", "in.csv has the column 'document' twice; rename one"),
        ("in.tsv", "query\tQuery \tdocument\nq\tp\ta\n", "in.tsv has the column 'query' twice; rename one"),
        ("in.csv", "id,id,query,document\n1,2,q,a\n", "in.csv has the column 'id' twice; rename one"),
        ("in.csv", "top_k,TOP_K,query,documents\n1,2,q,[]\n", "in.csv has the column 'top_k' twice; rename one"),
        ("in.json", '{"query": "q", "documents": ["d"]}\n', "looks like JSON lines: --input-format jsonl"),
        ("in.jsonl", "query,document\na,b\n", "in.jsonl looks like CSV: --input-format csv"),
        ("in.jsonl", "words\n", "looks like plain text, and this command reads jsonl, json, csv, tsv or parquet"),
        (
            "in.txt",
            '{"query": "q", "documents": ["d"]}\n',
            "in.txt is plain text by its name, and this command reads jsonl",
        ),
        ("in.dat", "", "--input-format"),
        ("in", "", "name its form with --input-format"),
        ("in.jsonl.gz", "{}", "is not gzip, or damaged"),
    ],
)
def test_input_that_is_no_batch_is_one_line(name: str, content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with stub() as service:
        err = cli("batch", name, "out.jsonl", "--url", service.url, cwd=tmp_path, code=2).stderr
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_blank_document_is_an_empty_text_and_every_other_blank_cell_is_absent(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("id,query,document,instruction\n,q,,\n")
    with stub() as service:
        cli("batch", "in.csv", "out.jsonl", "--url", service.url, cwd=tmp_path)
    assert service.bodies == [{"query": "q", "documents": [""]}]
    assert read_lines(tmp_path / "out.jsonl") == [{"row": 1, "id": None, "score": 0.5}]


def test_an_encoding_of_parquet_has_no_effect(tmp_path: Path) -> None:
    write(tmp_path / "in.parquet", PAIRS)
    for args in (("rank", "q", "--file", "in.parquet"), ("batch", "in.parquet", "out.jsonl")):
        err = cli(*args, "--encoding", "gb18030", cwd=tmp_path, code=2).stderr
        assert err == "error: --encoding has no effect: in.parquet is Parquet, always UTF-8; leave it out\n"


@pytest.mark.parametrize("name", ["out.csv", "out.TSV", "out.parquet", "out.jsonl.gz"])
def test_an_output_named_after_another_form_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "in.csv").write_text("query,document\nq,d\n")
    err = cli("batch", "in.csv", name, cwd=tmp_path, code=2).stderr
    assert err == f"error: {name}: the output is JSON lines, not compressed: name it *.jsonl\n"
    assert not (tmp_path / name).exists()


def test_what_batch_cannot_read_again(tmp_path: Path) -> None:
    assert "error: . is a folder" in cli("batch", ".", "o.jsonl", cwd=tmp_path, code=2).stderr
    for name in ("-", "/dev/stdin"):
        err = cli("batch", name, "o.jsonl", cwd=tmp_path, code=2, stdin=b"{}").stderr
        assert "is a pipe, and batch reads its input again to continue; write it to a file first" in err


@pytest.mark.parametrize("name", ["in.csv", "in.tsv.gz", "in.parquet", "in.json"])
def test_an_interrupted_table_is_continued(name: str, tmp_path: Path) -> None:
    good = [{"id": f"r{i}", "query": f"q{i}", "document": "d\ne"} for i in range(9)]
    write(tmp_path / name, [*good[:4], {"id": "bad", "query": "", "document": "d"}, *good[4:]])
    with stub() as service:
        args = ("batch", name, "out.jsonl", "--url", service.url)
        err = cli(*args, cwd=tmp_path, code=2).stderr
        assert "4 rows are done: run again with --skip-bad to continue, or correct the input and start anew" in err
        said = cli(*args, "--skip-bad", cwd=tmp_path).stderr
        assert "continuing after row 4: 4 rows are done\n" in said
        assert "\n6 rows, 5 documents in " in said
        assert '1 bad row was skipped; see "error" in the output\n' in said
    assert sorted(body["query"] for body in service.bodies) == [f"q{i}" for i in range(9)]
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["row"] for row in rows] == list(range(1, 11))
    assert [row["id"] for row in rows] == ["r0", "r1", "r2", "r3", "bad", *(f"r{i}" for i in range(4, 9))]


def test_rows_before_a_broken_table_are_written(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text('query,document\nq1,a\nq2,b\nq3,"c\n')
    with stub() as service:
        args = ("batch", "in.csv", "out.jsonl", "--url", service.url, "--skip-bad")
        err = cli(*args, cwd=tmp_path, code=2).stderr
    assert err.endswith("error: in.csv line 4 is not CSV: unexpected end of data\n")
    assert [row["row"] for row in read_lines(tmp_path / "out.jsonl.partial")] == [1, 2]
    assert not (tmp_path / "out.jsonl").exists()


def test_a_whole_number_that_pandas_wrote_as_a_float(tmp_path: Path) -> None:
    rows = [
        {"id": 7.0, "query": "q", "documents": ["a", "b"], "top_k": 1.0},
        {"id": float("nan"), "query": "q", "documents": ["a", "b"], "top_k": float("nan")},
    ]
    write(tmp_path / "in.parquet", rows)
    with stub() as service:
        cli("batch", "in.parquet", "out.jsonl", "--url", service.url, cwd=tmp_path)
    first, second = read_lines(tmp_path / "out.jsonl")
    assert first == {"row": 1, "id": 7, "results": [{"index": 0, "score": 0.5}]}
    assert (second["id"], len(second["results"])) == (None, 2)
