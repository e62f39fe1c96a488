"""Files split into parts, and the rows read from each."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from reranker.batch.parts import Part, records, scan, split_into_parts
from reranker.errors import InputError
from reranker.notes import Notes
from reranker.rows.inputs import Record
from reranker.rows.row import Defaults, Row, read_row
from reranker.terminal import note
from reranker.types import RerankRequest
from tests.request.bodies import ROWS


def parts_of(path: Path, size: int) -> list[Part]:
    address = f"file://{path}"
    return split_into_parts({address: scan(address, size)})


def read(path: Path, size: int, say: Callable[[str], None] = note) -> list[Row]:
    notes = Notes(say)
    return [read_row(record, Defaults()) for part in parts_of(path, size) for record in records(part, notes.add)]


LINES = [b"", b"a", b"bc\r", b"x" * 40, b"", b"def", b"y" * 9, b"", b"last"]


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_lines_are_split_at_their_ends_and_numbered(
    tmp_path: Path, end: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
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
            assert part.stop - part.start >= size  # by less than one line, see below
            assert b"\n" not in whole[part.start + size - 1 : part.stop - 1]
        assert [part.first for part in parts] == [whole[: part.start].count(b"\n") + 1 for part in parts]


@pytest.mark.parametrize("group", [1, 4, 7, 100])
def test_rows_of_parquet_are_all_there_once(tmp_path: Path, group: int) -> None:
    path = tmp_path / "in.parquet"
    table = pyarrow.Table.from_pylist([{"id": i, "query": f"q{i}", "documents": [f"d{i}"]} for i in range(100)])
    pyarrow.parquet.write_table(table, path, row_group_size=group)
    for size in (1, 100, 300, 1000, 1 << 20):
        rows = read(path, size)
        assert [(row.number, row.id) for row in rows] == [(i + 1, i) for i in range(100)]
        assert all(row.request == RerankRequest(f"q{row.id}", [f"d{row.id}"]) for row in rows)
    assert len(parts_of(path, 1)) == 100
    assert len(parts_of(path, 1 << 20)) == 1


def test_a_line_without_end_is_one_bad_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reranker.batch.parts._MAX_LINE", 100)
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


def test_a_row_of_a_part_means_the_same_as_a_body(tmp_path: Path) -> None:
    """JSON lines and Parquet, whose absent values are nulls."""
    for name in ("in.jsonl", "in.parquet"):
        path, values = tmp_path / name, ROWS
        if name == "in.jsonl":
            path.write_text("".join(json.dumps(value) + "\n" for value in values))
        else:
            values = [row for row in ROWS if all(isinstance(d, str) for d in row.get("documents") or row["texts"])]
            values = [{n: v for n, v in row.items() if not (n in NUMBERS and isinstance(v, str))} for row in values]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values, schema=SCHEMA), path)
        rows = read(path, 1 << 20)
        assert [row.error for row in rows] == [""] * len(values)
        for row, value in zip(rows, values, strict=True):
            expected = read_row(Record(0, "", 0, value), Defaults())
            assert (row.request, row.top_k, row.warnings) == (expected.request, expected.top_k, expected.warnings)


NUMBERS = ("top_k", "top_n", "max_tokens_per_doc", "max_chunks_per_doc", "max_chunk_per_doc")
SCHEMA = pyarrow.schema(
    [(name, pyarrow.string()) for name in ("query", "instruction", "instruct", "model")]
    + [(name, pyarrow.list_(pyarrow.string())) for name in ("documents", "texts")]
    + [(name, pyarrow.float64()) for name in NUMBERS]
    + [("truncate", pyarrow.bool_())]
)


def test_columns_that_are_not_read_are_noted_once(tmp_path: Path) -> None:
    lines: list[str] = []
    row = {"id": 1, "query": "q", "documents": ["d"], "topk": 3, "lang": "en"}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row] * 3), tmp_path / "in.parquet")
    assert len(parts_of(tmp_path / "in.parquet", 1)) == 3
    read(tmp_path / "in.parquet", 1, lines.append)
    assert lines == ["in.parquet: the column topk is not read", "in.parquet: the column lang is not read"]


def test_the_name_of_a_column_cannot_command_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    row = {"query": "q", "documents": ["d"], "a\x1b[2Jb": 1}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "in.parquet")
    read(tmp_path / "in.parquet", 1)
    assert capfd.readouterr().err == "note: in.parquet: the column a\N{REPLACEMENT CHARACTER}[2Jb is not read\n"
