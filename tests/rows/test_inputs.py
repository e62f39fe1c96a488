"""Forms and encodings of input files: texts, notes, and errors that name the fix."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from reranker.errors import CommandError, InputError
from reranker.rows import columns, documents, forms
from reranker.rows.inputs import open_input
from reranker.terminal import note
from tests.cli.command import COMMAND, cli, environment, stub, write_lines
from tests.conftest import ROOT

TEXTS = ["gzip 压缩文件", 'a "quoted", text', "two\nlines\n\nand a blank one", "tab\there", "", "1"]
PLAIN = ["gzip 压缩文件", '"quoted", text', "[1] a footnote", "no; delimiter, here"]


@pytest.fixture(autouse=True)
def notes() -> None:
    """A note is printed once per process; each test starts anew."""
    note.cache_clear()


def table(texts: list[str], delimiter: str = ",", heading: str = "text", end: str = "\r\n") -> str:
    file = io.StringIO()
    rows = csv.writer(file, delimiter=delimiter, lineterminator=end)
    rows.writerow(["编号", heading, "score"])
    rows.writerows([i, text, 0.5] for i, text in enumerate(texts))
    return file.getvalue()


def parquet(columns: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


OBJECTS = [{"id": i, "title": "no", "text": text} for i, text in enumerate(TEXTS)]
GOOD: dict[str, tuple[str, list[str]]] = {
    "lines.txt": ("\n".join(PLAIN), PLAIN),
    "noend": ("\n\n".join(PLAIN) + "\n", PLAIN),
    "strings.jsonl": ("\n".join(map(json.dumps, TEXTS)), TEXTS),
    "objects.ndjson": ("\n\n".join(map(json.dumps, OBJECTS)) + "\n", TEXTS),
    "array.json": (json.dumps(TEXTS), TEXTS),
    "pretty.json": (json.dumps(OBJECTS, indent=2, ensure_ascii=False), TEXTS),
    "mixed.json": (json.dumps([*OBJECTS, "last"]), [*TEXTS, "last"]),
    "comma.csv": (table(TEXTS), TEXTS),
    "semicolon.csv": (table(TEXTS, ";"), TEXTS),
    "sep.csv": ("sep=;\r\n" + table(TEXTS, ";"), TEXTS),
    "named.csv": (table(TEXTS, heading=" 内容"), TEXTS),
    "upper.csv": (table(TEXTS, heading="Content"), TEXTS),
    "pandas.tsv": (table(TEXTS, "\t", end="\n"), TEXTS),
    "literal.tsv": (
        'id\ttext\n1\t"half a quote\n2\tfive inches: 5" and 6"\n3\t"whole"\n4\t" open\n',
        ['"half a quote', 'five inches: 5" and 6"', "whole", '" open'],
    ),
    "last.tsv": ('text\tid\n"two\nlines"\t1\n"a\tb"\t2\n', ["two\nlines", "a\tb"]),
    "open.tsv": ('id\ttext\n1\t"two\nlines"\n2\tb\n', ["two\nlines", "b"]),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030", "utf-16"])
@pytest.mark.parametrize("name", GOOD)
def test_every_form_in_every_encoding(name: str, encoding: str, packed: bool, tmp_path: Path) -> None:
    text, expected = GOOD[name]
    content = text.encode(encoding)
    path = tmp_path / f"{name}{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert documents.read(str(path), None, None, "gb18030" if encoding == "gb18030" else None) == expected


@pytest.mark.parametrize("name", ["d.parquet", "d.PARQUET.gz"])
def test_parquet(name: str, tmp_path: Path) -> None:
    content = parquet({"id": range(6), "vector": [[0.5, 0.5]] * 6, "blob": [b"\0"] * 6, "text": TEXTS})
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert documents.read(str(tmp_path / name), None, None, None) == TEXTS
    with open_input(str(tmp_path / name), None, None) as source:
        list(source.records())
        assert source.columns == ["id", "text"]


def awkward(name: str, columns: int) -> tuple[bytes, list[str]]:
    """Return a table as Python's csv module and pandas write it, of texts with all kinds of breaks, and the texts."""
    pieces = ["", "a", '"', '""', "\n", "\r\n", "\t", ",", "字", '"\n', ' "']
    texts = [a + b + c for a in pieces for b in ("", "x", '"') for c in pieces]
    if name.endswith(".tsv"):  # the lines of a text with tabs and line ends may be rows
        texts = [text for text in texts if "\t" not in text or "\n" not in text]
    file = io.StringIO()
    rows = csv.writer(file, delimiter="\t" if name.endswith(".tsv") else ",")
    rows.writerow(["id", "text", "more"][:columns])
    rows.writerows([str(i), text, "m"][:columns] for i, text in enumerate(texts))
    return file.getvalue().encode(), texts


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
def test_a_table_is_read_as_it_was_written(name: str, columns: int, tmp_path: Path) -> None:
    content, texts = awkward(name, columns)
    (tmp_path / name).write_bytes(content)
    assert documents.read(str(tmp_path / name), None, None, None) == texts


@pytest.mark.parametrize(
    ("name", "content", "field", "expected"),
    [
        ("a.csv", "id,body,text\n1,b,t\n", "body", "b"),
        ("a.csv", "id,BODY,text\n1,b,t\n", "body", "b"),
        ("a.csv", "text,Text,id\n1,2,3\n", "Text", "2"),
        ("a.csv", "content,text,id\n1,2,3\n", None, "2"),
        ("a.csv", "text\none\n", None, "one"),
        ("a.csv", "heading\none\n", "heading", "one"),
        ("a.csv", "id,text,\n1,x,\n", None, "x"),
        ("a.csv", "id,text\n1,x,,\n", None, "x"),
        ("a.jsonl", '{"id": 1, "abstract": "x"}', "abstract", "x"),
        ("a.jsonl", '{"id": 1, "Passage": "x", "documents": ["y"]}', None, "x"),
        ("a.json", '[{"document": "x", "n": 1}]', None, "x"),
    ],
)
def test_the_text_is_the_named_column_or_a_known_one(
    name: str, content: str, field: str | None, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(content)
    assert documents.read(str(tmp_path / name), None, field, None) == [expected]
    key = content.splitlines()[0]
    said = capsys.readouterr().err
    assert bool(said) == (field is None and "text" not in key)
    assert "choose another with --field" in said or not said


PRETTY = json.dumps([{"text": "a"}, {"text": "b"}], indent=1)
OBJECT = json.dumps({"documents": ["a", "b"]}, indent=1)
REFUSED: list[tuple[str, bytes | str, str]] = [
    # a name without a form, or with a wrong one
    ("a.xlsx", "x", "cannot tell the form of a.xlsx by its name (.xlsx); name it with --input-format: lines, jsonl"),
    ("a.md", "x", "--input-format"),
    ("a.xlsx.gz", "x", "(.xlsx)"),
    ("a.txt", PRETTY, "a.txt looks like a JSON array: --input-format json, or --input-format lines"),
    ("a.txt", '["a", "b"]', "looks like a JSON array: --input-format json"),
    ("a.txt", OBJECT, "a JSON object over several lines"),
    ("a.txt", '\n{"text": "a"}\n{"text": "b"}\n', "looks like JSON lines: --input-format jsonl"),
    ("noend", '{"text": "a"}', "looks like JSON lines"),
    ("a.txt", "id,text\n1,a\n", "looks like CSV: --input-format csv"),
    ("a.txt", '"编号";"内容"\n1;a\n', "looks like CSV"),
    ("a.txt", "id\ttext\n1\ta\n", "looks like TSV: --input-format tsv"),
    ("a.jsonl", PRETTY, "looks like a JSON array: --input-format json"),
    ("a.jsonl", '["a", "b"]', "looks like a JSON array: --input-format json"),
    ("a.jsonl", OBJECT, "a JSON object over several lines"),
    ("a.jsonl", "id,text\n1,a\n", "looks like CSV: --input-format csv"),
    ("a.jsonl", "some words\nand more\n", "looks like plain text: --input-format lines"),
    ("a.json", '{"text": "a"}\n{"text": "b"}\n', "looks like JSON lines: --input-format jsonl"),
    ("a.json", OBJECT, "a.json is a request with its documents, for batch, one a line"),
    ("a.json", json.dumps({"text": "a"}, indent=1), "a JSON object over several lines"),
    ("a.json", "id,text\n1,a\n", "looks like CSV"),
    ("a.json", "words", "looks like plain text"),
    ("a.json", '"a"\n"b"\n', "looks like JSON lines: --input-format jsonl"),
    (
        "a.json",
        json.dumps({"query": "q", "texts": ["a"]}),
        "a.json is a request with its documents, for batch, one a line",
    ),
    ("a.json", json.dumps([{"documents": ["a"]}]), 'a.json row 1 is a request with "documents"; batch reads requests'),
    ("a.jsonl", json.dumps({"query": "q", "documents": ["a"]}), 'a.jsonl line 1 is a request with "documents"'),
    ("a.csv", PRETTY, "looks like a JSON array"),
    ("a.csv", "id\tabstract\n1\ta\n", "looks like TSV: --input-format tsv"),
    ("a.tsv", "id,abstract\n1,a\n", "looks like CSV: --input-format csv"),
    ("a.tsv", '{"text": "a"}', "looks like JSON lines"),
    ("a.parquet", "id,text\n", "a.parquet is not Parquet"),
    ("a.gz", "text", "is not gzip, or damaged"),
    ("a.txt", gzip.compress(b"x"), "is compressed with gzip; let its name end in .gz"),
    ("a.csv", parquet({"text": ["a"]}), "is Parquet: --input-format parquet"),
    ("a.csv", b"PK\x03\x04rest", "Excel workbook or an archive; save it as CSV"),
    ("a.txt", b"%PDF-1.7", "is a PDF"),
    ("a.jsonl", b"\x28\xb5\x2f\xfd..", "zstd"),
    ("a.txt", b"words\0words", "NUL bytes"),
    ("a.txt", "x\n".encode("utf-16-le"), "UTF-16 (--encoding utf-16-le)"),
    ("a.txt", "x\n".encode("utf-32"), "UTF-32; save it as UTF-8"),
    ("a.txt", b"one\rtwo\rthree", "ends its lines with CR alone"),
    # damaged files
    ("a.txt.gz", gzip.compress(b"word " * 999)[:-20], "not whole: its compressed data ends too early"),
    ("a.txt.gz", gzip.compress(b"word")[:10] + b"x" * 40, "damaged"),
    ("a.parquet", parquet({"text": ["a"]})[:-9], "cannot be read as Parquet"),
    ("a.parquet", parquet({"text": ["a" * 99]}).replace(b"aaaa", b"\xff\xff\xff\xff", 1)[:30] + b"PAR1", "Parquet"),
    ("a.json", '[{"text": "a"},\n {"text" "b"}]', "a.json is not JSON: Expecting ':' delimiter at line 2 column 10"),
    ("a.json", '["a"', "is not JSON"),
    ("a.csv", 'id,text\n1,"a\n2,b\n', "a.csv line 2 is not CSV"),
    ("a.csv", 'text,id\na,1\n"b" c,2\n', "a.csv line 3 is not CSV"),
    ("a.csv", "id,text\n1,a\r2,b\n", "a.csv line 2 is not CSV: a line ends in CR alone"),
    ("a.txt", "fine\n" * 20_000 + "no\0t\n", "a.txt line 20001 holds a NUL byte"),
    ("a.tsv", 'id\ttext\n1\ta\n2\t"def f():\n\treturn 1"\n', "line 3: a quote opens here and closes in line 4"),
    # encodings
    ("a.txt", "重排".encode("gb18030"), "line 1 is not UTF-8 at byte 0; if the file is GBK: --encoding gb18030"),
    ("a.csv", "编号,内容\n1,压缩\n".encode("gb18030"), "line 1 is not UTF-8 at byte 0; if the file is GBK: --encoding"),
    ("a.json", json.dumps(["压缩"], ensure_ascii=False).encode("gb18030"), "if the file is GBK: --encoding gb18030"),
    ("a.txt", b"caf\xe9 au lait", "save it as UTF-8, or name its encoding with --encoding"),
    # columns
    ("a.csv", "编号,标题\n1,a\n", "its columns are 编号, 标题: name one with --field"),
    ("a.csv", "one\ntwo\n", "if it is one, name it with --field; if it is a document, use --input-format lines"),
    ("a.csv", "text,id,Text\na,1,b\n", "has the column 'text' twice"),
    ("a.csv", "id,text\n1,a\n2\n", "row 2 (line 3) has too few columns: 1, not 2"),
    ("a.csv", 'id,text\n1,"a\nb"\n2,c,d\n', "row 2 (line 4) has too many columns: 3, not 2"),
    ("a.tsv", "id\ttext\n1\ta\n2\n", "row 2 (line 3) has too few columns"),
    ("a.jsonl", '{"id": 1, "abstract": "x"}', "its keys are id, abstract: name one with --field"),
    ("a.jsonl", '{"text": "x"}\n{"content": "y"}\n', 'line 2 is neither a string nor an object with a string "text"'),
    ("a.json", "[1, 2]", 'a.json row 1 is neither a string nor an object with a string "text": it holds a number'),
    ("a.json", '["a", null]', 'row 2 is neither a string nor an object with a string "text": it holds null'),
    ("a.jsonl", '{"text": 1}', 'its "text" holds a number'),
    ("a.jsonl", '{"text": null}', 'its "text" holds null'),
    ("a.jsonl", '{"text": "x"}\n3\n', "line 2 is neither a string nor an object"),
    ("a.parquet", parquet({"id": [1], "text": [None]}), 'row 1 is neither a string nor an object with a string "text"'),
    ("a.parquet", parquet({"id": [1], "abstract": ["x"]}), "its columns are id, abstract"),
    # empty files
    ("a.txt", "", "a.txt holds no documents"),
    ("a.txt", "\ufeff\n \n", "a.txt holds no documents"),
    ("a.csv", "id,text\n", "a.csv holds no documents"),
    ("a.json", "[]", "a.json holds no documents"),
    ("a.json", "", "a.json holds no documents"),
    ("a.jsonl.gz", gzip.compress(b""), "a.jsonl.gz holds no documents"),
]


@pytest.mark.parametrize(("name", "content", "says"), REFUSED, ids=[f"{n}-{s[:40]}" for n, _, s in REFUSED])
def test_what_cannot_be_read_is_one_line(
    name: str, content: bytes | str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError) as error:
        documents.read(name, None, None, None)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "encoding", "says"),
    [
        ("压缩文件，猫是一种小动物", "gb18030", "is UTF-8; leave --encoding gb18030 out"),
        ("\ufeffabc", "gbk", "byte order mark of UTF-8; leave --encoding gb18030 out"),
        ("words\nand more\n", "utf-16", "is UTF-8; leave --encoding utf-16 out"),
        ("words\tand more\n", "utf-16-le", "is UTF-8; leave --encoding utf-16-le out"),
        ("压缩文件\n" * 40_000, "utf-16-be", "is UTF-8; leave --encoding utf-16-be out"),
        ("a", "", "--encoding='' is not known"),
        ("a", "ebcdic-of-mine", "--encoding='ebcdic-of-mine' is not known; such as utf-8, gb18030"),
        ("a", "base64", "is not known"),
        ("a", "cp037", "is not known"),
        ("abc", "utf-16", "is UTF-8; leave --encoding utf-16 out"),
        ("\x01bc", "utf-16", "is not UTF-16 at byte 2"),
    ],
)
def test_an_encoding_that_is_not_that_of_the_file(content: str, encoding: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(content.encode())
    with pytest.raises(InputError, match=says.replace("(", r"\(")):
        documents.read(str(tmp_path / "a.txt"), None, None, encoding)


@pytest.mark.parametrize("encoding", ["gbk", "GB2312", "gb18030", "big5", "utf-16-le", "utf_8", "utf-8-sig", "cp1252"])
def test_encodings_by_their_names(encoding: str, tmp_path: Path) -> None:
    text = "café ünd more" if encoding == "cp1252" else "中文文件中文文件"
    (tmp_path / "a.txt").write_bytes(f"{text}\nb".encode(encoding))
    assert documents.read(str(tmp_path / "a.txt"), None, None, encoding) == [text, "b"]


def test_lines_that_look_like_another_form_are_read_when_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"text": "a"}\nid,text\n')
    assert documents.read(str(tmp_path / "a.txt"), "lines", None, None) == ['{"text": "a"}', "id,text"]


def test_parquet_without_pyarrow_names_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "a.parquet").write_bytes(parquet({"text": ["a"]}))
    with pytest.raises(CommandError, match=r"needs pyarrow: .*python.* -m pip install -r requirements-eval\.txt"):
        documents.read(str(tmp_path / "a.parquet"), None, None, None)


def test_the_document_names_every_form_and_column() -> None:
    text = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)` \| `\.\w+`", text, re.M) == list(forms.KINDS)
    names = text.partition("the first of ")[2].partition(" that is there")[0]
    assert re.findall(r"`(\w+)`", names) == list(columns.TEXT_NAMES)


PIECES = [piece.encode() for piece in '" \n \r \t , ; [ { } ] : null NaN 1e999 text \ufeff'.split(" ")]
PIECES += [b"\0", b"\xff", b"9" * 5000, b"[" * 3000, b'{"a":' * 2000]


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.csv.gz", "a"])
def test_damaged_files_are_read_or_refused(name: str, tmp_path: Path) -> None:
    """Each file in each form gives documents or an error of the command line, never another exception."""
    whole = [text.encode() for text, _ in GOOD.values()] + [parquet({"id": [1], "text": ["a"]})]
    whole += [c if isinstance(c, bytes) else c.encode() for _, c, _ in REFUSED]
    whole += [gzip.compress(content) for content in whole]
    dice = random.Random(name)
    for content in whole * 4:
        damaged = bytearray(content)
        for _ in range(dice.randrange(4)):
            place = dice.randrange(len(damaged) + 1)
            damaged[place : place + dice.choice([0, 0, 1, 9])] = dice.choice([*PIECES, b""])
        (tmp_path / name).write_bytes(damaged)
        kind, encoding = dice.choice([None, *forms.KINDS]), dice.choice([None, "gb18030", "utf-16", "big5", "utf-7"])
        with suppress(CommandError):
            found = documents.read(str(tmp_path / name), kind, None, encoding)
            assert found
            assert all(isinstance(text, str) for text in found)


def test_an_error_quotes_a_file_harmlessly(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(f'"evil \x1b]0;t\x07\nname",b,{"long " * 999}\n1,2,3\n')
    err = cli("rank", "q", "--file", "a.csv", cwd=tmp_path, code=2).stderr
    assert err.isprintable() or err[:-1].isprintable()
    assert len(err) < 300


# As a command


def ranked(tmp_path: Path, *args: object, stdin: bytes = b"") -> tuple[list[str], str]:
    """Return the documents that the service received, and standard error."""
    with stub() as service:
        done = cli("rank", "q", *args, "--url", service.url, cwd=tmp_path, stdin=stdin)
    return service.bodies[0]["documents"], done.stderr


def test_a_chinese_table_from_excel(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_bytes("编号,内容\r\n1,压缩文件\r\n2,猫\r\n".encode("gbk"))
    err = cli("rank", "q", "--file", "d.csv", cwd=tmp_path, code=2).stderr
    assert err == "error: d.csv line 1 is not UTF-8 at byte 0; if the file is GBK: --encoding gb18030\n"
    found, said = ranked(tmp_path, "--file", "d.csv", "--encoding", "gbk")
    assert found == ["压缩文件", "猫"]
    assert said == "note: the documents are '内容' of d.csv; choose another with --field\n"


@pytest.mark.parametrize("args", [[], ["--file", "-"]])
def test_standard_input_is_lines_unless_it_looks_otherwise(args: list[str], tmp_path: Path) -> None:
    assert ranked(tmp_path, *args, stdin=b"one\n\ntwo")[0] == ["one", "two"]
    err = cli("rank", "q", *args, cwd=tmp_path, code=2, stdin=b'[\n"a"]').stderr
    assert err.startswith("error: standard input looks like a JSON array: --input-format json")
    assert ranked(tmp_path, *args, "--input-format", "json", stdin=b'[\n"a"]')[0] == ["a"]
    assert ranked(tmp_path, *args, "--input-format", "csv", stdin=b"id;text\n1;a")[0] == ["a"]
    assert ranked(tmp_path, *args, "--input-format", "parquet", stdin=parquet({"text": ["a"]}))[0] == ["a"]


def test_a_process_substitution_is_as_standard_input(tmp_path: Path) -> None:
    with stub() as service:
        command = f"{' '.join(COMMAND)} rank q --url {service.url} --file <(printf 'one\\ntwo\\n')"
        subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), check=True, timeout=60)
    assert service.bodies[0]["documents"] == ["one", "two"]


def test_keys_that_are_not_ranked_are_said_once_each(tmp_path: Path) -> None:
    rows = [{"_id": 1, "title": "t", "text": "a", "url": None}, {"text": "b", "title": "t", "url": "u"}]
    write_lines(tmp_path / "d.jsonl", rows)
    assert ranked(tmp_path, "--file", "d.jsonl") == (
        ["a", "b"],
        "note: 'title' is not read in d.jsonl\nnote: 'url' is not read in d.jsonl\n",
    )
    write_lines(tmp_path / "d.jsonl", [{"text": "a", f"key {i}": i} for i in range(200)])
    said = ranked(tmp_path, "--file", "d.jsonl")[1].splitlines()
    assert len(said) == 21
    assert said[-1] == "note: 20 different notes were written; no more follow"


def test_what_has_no_effect_is_refused(tmp_path: Path) -> None:
    for name, content in (("d.txt", "a\nb\n"), ("d.jsonl", '"a"\n"b"\n')):
        (tmp_path / name).write_text(content)
        err = cli("rank", "q", "--file", name, "--field", "body", cwd=tmp_path, code=2).stderr
        assert err == f"error: --field body has no effect: {name} holds texts without columns or keys\n"
    for option, value in (("--field", "x"), ("--input-format", "csv"), ("--encoding", "gbk")):
        err = cli("rank", "q", "d", option, value, cwd=tmp_path, code=2).stderr
        assert err.startswith(f"error: {option} is for --file and standard input")
    assert "Is a directory" in cli("rank", "q", "--file", ".", cwd=tmp_path, code=2).stderr
