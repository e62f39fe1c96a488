"""A row means what a body means: read alone, by `batch` with a model, and by `batch` through a service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from reranker.errors import InputError, InvalidRequestError
from reranker.request.fields import FIELDS
from reranker.request.parse import parse_request
from reranker.rows.row import COLUMNS, pair_of, request_of
from tests.cli.command import cli, read_lines, stub, write_lines
from tests.cli.test_rank import url
from tests.conftest import Server, Start
from tests.http.test_rerank import ranked
from tests.request.bodies import BASE, LONG, REFUSED, ROWS


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_read_as_a_body(row: dict[str, Any]) -> None:
    parsed, read = parse_request(row), request_of({"id": 1} | row, None, None)
    assert (read.request, read.top_k, read.warnings) == (parsed.request, parsed.limit, parsed.warnings)


@pytest.mark.parametrize("row", REFUSED[2:])
def test_a_row_is_refused_in_the_words_of_a_body(row: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as expected:
        parse_request(row)
    with pytest.raises(InputError) as caught:
        request_of(row, 5, "i")
    assert str(caught.value) == str(expected.value)


def test_a_row_that_is_no_object() -> None:
    for row in (["a"], "a", None, 3):
        with pytest.raises(InputError, match="must be an object with query and documents; got "):
            request_of(row, None, None)


def test_what_a_row_does_not_say_is_said_for_it() -> None:
    read = request_of(BASE, 7, "mine")
    assert (read.top_k, read.request.instruction) == (7, "mine")
    for row in ({"top_k": "", "instruction": ""}, {"top_n": 0, "model": "m"}, {"top_k": None, "instruct": None}):
        assert request_of(BASE | row, 7, "mine") == read
    read = request_of(BASE | {"top_n": 2, "instruct": "own"}, 7, "mine")
    assert (read.top_k, read.request.instruction) == (2, "own")


def test_what_only_changes_the_form_of_an_answer_is_said() -> None:
    assert request_of(BASE | {"return_documents": False, "raw_scores": "false"}, None, None).warnings == ()
    for name, value in (("return_documents", True), ("return_text", "1"), ("raw_scores", 1), ("use_activation", False)):
        [warning] = request_of(BASE | {name: value}, None, None).warnings
        assert "not read in a batch" in warning


def test_a_pair_is_a_row_of_one_document() -> None:
    more = {"max_tokens_per_doc": 3, "truncate": False, "title": "t"}
    pair = pair_of({"id": 1, "query": "q", "document": {"text": "d", "lang": "en"}} | more, "i")
    assert pair.request == request_of({"query": "q", "documents": ["d"]} | more, None, "i").request
    assert pair.warnings == ("title is not read", "document: lang is not read; to have it read, name it in rank_fields")
    for document in (None, 3, ["a"], {"title": "t"}):
        with pytest.raises(InputError, match=r"^document: must be a string or an object"):
            pair_of({"query": "q", "document": document}, None)
    with pytest.raises(InputError, match=r"^query: is required"):
        pair_of({"document": "d"}, None)
    for limit in ({"top_k": 3}, {"top_n": "1"}):
        assert pair_of({"query": "q", "document": "d"} | limit, None).warnings == (
            "top_k and top_n are not read beside document: its result is one score",
        )
    assert pair_of({"query": "q", "document": "d", "top_k": None}, None).warnings == ()
    values: dict[str, object] = {"chat_template_kwargs": {"instruction": "own", "instruct": None}}
    assert pair_of({"query": "q", "document": "d"} | values, "i").request.instruction == "own"
    assert set(COLUMNS) == {"id", "document", *FIELDS, "chat_template_kwargs"}


@pytest.fixture(scope="module")
def short(start: Start) -> Server:
    server: Server = start(MAX_SEQ_LENGTH="200", MODEL_DEVICE="cpu")
    return server


def test_the_service_and_both_batches_agree(short: Server, tmp_path: Path) -> None:
    rows = ROWS + REFUSED
    write_lines(tmp_path / "in.jsonl", rows)
    options = ("--skip-bad", "--device", "cpu", "--max-seq-length", 200)
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
