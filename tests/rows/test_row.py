"""A row means the same as a body: alone, in `batch` with a model, and in `batch` through a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reranker.errors import InvalidRequestError
from reranker.request.fields import FIELDS
from reranker.request.parse import parse_request
from reranker.rows.inputs import Record
from reranker.rows.row import COLUMNS, Defaults, Row, read_row
from tests.cli.command import cli, read_lines, stub, write_lines
from tests.cli.test_rank import url
from tests.conftest import Server
from tests.http.test_rerank import ranked
from tests.request.bodies import BASE, LONG, REFUSED, ROWS


def read(body: Any, top_k: int | None = None, instruction: str | None = None) -> Row:
    return read_row(Record(3, "line 3", 9, body), Defaults(top_k, instruction))


@pytest.mark.parametrize("body", ROWS)
def test_a_row_is_read_as_a_body(body: dict[str, Any]) -> None:
    parsed, row = parse_request(body), read({"id": 1} | body)
    assert row == Row(3, "line 3", 9, 1, parsed.request, parsed.limit, warnings=parsed.warnings)


@pytest.mark.parametrize("body", REFUSED[2:])
def test_a_row_is_refused_in_the_words_of_a_body(body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as expected:
        parse_request(body)
    assert read({"id": 1} | body, 5, "i") == Row(3, "line 3", 9, 1, error=str(expected.value))


def test_a_row_that_is_no_object() -> None:
    for body in (["a"], "a", None, 3):
        row = read(body)
        assert row.error.startswith("must be an object with query and documents; got ")
        assert row.request is None


def test_a_record_without_a_value_keeps_its_error() -> None:
    row = read_row(Record(3, "row 3 (line 4)", 9, error="this is not JSON"), Defaults())
    assert row == Row(3, "row 3 (line 4)", 9, error="this is not JSON")


def test_defaults_hold_for_rows_without_their_own() -> None:
    row = read(BASE, 7, "mine")
    assert row.request is not None
    assert (row.top_k, row.request.instruction) == (7, "mine")
    for body in ({"top_k": "", "instruction": ""}, {"top_n": 0, "model": "m"}, {"top_k": None, "instruct": None}):
        assert read(BASE | body, 7, "mine") == row
    row = read(BASE | {"top_n": 2, "instruct": "own"}, 7, "mine")
    assert row.request is not None
    assert (row.top_k, row.request.instruction) == (2, "own")


def test_fields_that_change_the_shape_of_a_response_are_noted() -> None:
    assert read(BASE | {"return_documents": False, "raw_scores": "false"}).warnings == ()
    for name, value in (("return_documents", True), ("return_text", "1"), ("raw_scores", 1), ("use_activation", False)):
        [warning] = read(BASE | {name: value}).warnings
        assert "not read in a batch" in warning


def test_a_pair_is_a_row_of_one_document() -> None:
    more = {"max_tokens_per_doc": 3, "truncate": False, "title": "t"}
    pair = read({"id": 1, "query": "q", "document": {"text": "d", "lang": "en"}} | more, instruction="i")
    assert pair.request == read({"query": "q", "documents": ["d"]} | more, instruction="i").request
    assert pair.pair
    assert pair.warnings == ("title is not read", "document: lang is not read; to have it read, name it in rank_fields")
    for document in (None, 3, ["a"], {"title": "t"}):
        assert read({"query": "q", "document": document}).error.startswith("document: must be a string or an object")
    assert read({"document": "d"}).error.startswith("query: is required")
    values: dict[str, object] = {"chat_template_kwargs": {"instruction": "own", "instruct": None}}
    row = read({"query": "q", "document": "d"} | values, instruction="i")
    assert row.request is not None
    assert row.request.instruction == "own"
    assert set(COLUMNS) == {"id", "document", *FIELDS, "chat_template_kwargs"}


def test_a_limit_on_the_results_of_a_pair_has_no_effect_and_is_noted() -> None:
    body = {"query": "q", "document": "d"}
    for limit in ({"top_k": 3}, {"top_n": "1"}):
        for top_k in (None, 2):
            row = read(body | limit, top_k)
            assert row.warnings == ("top_k and top_n are not read beside document: its result is one score",)
            assert row.top_k is None
    assert read(body | {"top_k": None}).warnings == ()
    row = read(body, 2)
    assert row.warnings == ("--top-k has no effect on a row with document: its result is one score",)
    assert row.top_k is None


def test_the_service_and_both_batches_agree(short: Server, tmp_path: Path) -> None:
    rows = ROWS + REFUSED
    write_lines(tmp_path / "in.jsonl", rows)
    options = ("--skip-bad", "--device", "cpu", "--max-seq-length", 160)
    local = cli("batch", "in.jsonl", "local.jsonl", *options, cwd=tmp_path)
    served = cli("batch", "in.jsonl", "served.jsonl", "--skip-bad", "--url", url(short), cwd=tmp_path)
    found = [read_lines(tmp_path / f"{name}.jsonl") for name in ("local", "served")]
    for row, one, other in zip(rows, *found, strict=True):
        response = short.client.post("/v1/rerank", json=row)
        if response.status_code != 200:
            assert one["error"] == other["error"] == response.json()["detail"]
            continue
        expected = ranked(response.json())
        for results in (one["results"], other["results"]):
            assert [r["index"] for r in results] == [index for index, _ in expected]
            assert [r["score"] for r in results] == pytest.approx([score for _, score in expected], abs=1e-5)
    assert sum("error" in row for row in found[0]) == len(REFUSED)
    for said in (local.stderr, served.stderr):
        assert "line 12: documents: title is not read; to have it read, name it in rank_fields" in said
        assert said.count("Qwen's prompt template was taken off") == 1
        assert "2 queries did not fit and were truncated" in said


def test_options_of_a_row_reach_the_service(tmp_path: Path) -> None:
    rows = [
        BASE | {"max_tokens_per_doc": "20", "max_chunks_per_doc": 4.0},
        BASE | {"truncate": False},
        BASE | {"truncate": True, "instruct": "i"},
        {"query": "q", "texts": ["a"]},
        BASE | {"max_chunks_per_doc": 1000},
    ]
    write_lines(tmp_path / "in.jsonl", rows)
    with stub() as service:
        said = cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, cwd=tmp_path).stderr
    bodies = {json.dumps(body, sort_keys=True) for body in service.bodies}
    assert bodies == {
        json.dumps(body, sort_keys=True)
        for body in (
            BASE | {"max_tokens_per_doc": 20, "max_chunks_per_doc": 4},
            BASE | {"truncate": False},
            BASE | {"truncate": True, "instruction": "i"},
            {"query": "q", "documents": ["a"], "truncate": True},
            BASE | {"max_chunks_per_doc": 64},
        )
    }
    assert "line 5: max_chunks_per_doc: a document is split into at most 64 chunks" in said


def test_notes_are_written_once_for_each_name_and_not_without_end(tmp_path: Path) -> None:
    row = {"id": 1, "query": "q", "documents": ["a"], "topk": 1, "user": "u"}
    write_lines(tmp_path / "in.jsonl", [row, row, *(row | {f"x{i}": i} for i in range(150))])
    with stub() as service:
        said = cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, cwd=tmp_path).stderr
    assert said.count("topk is not read") == 1
    assert "line 1: topk is not read; did you mean top_k?" in said
    assert said.count("is not read") == 100
    assert said.count("100 different notes were written; no more follow") == 1


def test_what_a_service_warns_of_is_passed_on(tmp_path: Path) -> None:
    """An older service may not know a field that this command sends."""
    headers = {
        "x-ignored-fields": "max_chunks_per_doc",
        "x-warnings": "max_chunks_per_doc is not read\x9b2J | 1 of 1 documents did not fit and were cut; more",
        "x-truncated-documents": "1",
        "x-truncated-query": "true",
    }
    write_lines(tmp_path / "in.jsonl", [{"query": "q", "documents": ["a"], "max_chunks_per_doc": 2}] * 3)
    with stub(*[(200, headers, b'[{"index": 0, "score": 0.5}]')] * 3) as service:
        said = cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, cwd=tmp_path).stderr
    assert said.count(f"note: {service.url}: max_chunks_per_doc is not read\N{REPLACEMENT CHARACTER}2J") == 1
    assert said.replace("\n", "").isprintable()
    assert "note: 1 of 1" not in said
    assert "3 documents did not fit" in said
    assert "3 queries did not fit and were truncated" in said


def test_an_error_names_a_document_by_its_place_in_the_row(short: Server, tmp_path: Path) -> None:
    documents = ["short"] * 300 + [LONG * 3]
    write_lines(tmp_path / "in.jsonl", [{"query": "q", "documents": documents, "truncate": False}])
    said = cli("batch", "in.jsonl", "out.jsonl", "--url", url(short), cwd=tmp_path, code=2).stderr
    assert "line 1: documents[300]: longer than the" in said
