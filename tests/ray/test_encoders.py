"""An encoder over Ray: the same logits from a replica and from a batch as from transformers, one pair at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from reranker.engine.scores import sigmoid
from tests.cli.command import cli, read_lines, write_lines
from tests.conftest import Start
from tests.engine.encoders import POSITIONS, SPECIAL, modernbert_mean, texts_with, xlm_roberta
from tests.engine.pairs import Pairs

QUERIES = ["how to compress files", "如何压缩文件", "a </s> b"]
DOCUMENTS = ["gzip compresses a file", "a game of chess", "", *texts_with(SPECIAL["xlm-roberta"])[:6]]


def test_a_replica(serve_run: Start, tmp_path: Path) -> None:
    folder = xlm_roberta(tmp_path / "model")
    reference = Pairs(folder)
    server = serve_run(
        MODEL_NAME_OR_PATH=str(folder), MODEL_DEVICE="cpu", MODEL_PRECISION="float32", MAX_BATCH_TOKENS="600"
    )
    info = server.client.get("/info").json()
    assert (info["family"], info["max_input_length"], info["reads_instruction"]) == ("XLM-RoBERTa", POSITIONS, False)
    documents = [*DOCUMENTS, "gzip " * 500]
    for query in QUERIES:
        body: dict[str, Any] = {"query": query, "documents": documents, "instruction": "Find code", "raw_scores": True}
        response = server.client.post("/v1/rerank", json=body)
        scores = {row["index"]: row["score"] for row in response.json()}
        expected = [reference.logit(query, document) for document in DOCUMENTS]
        expected.append(reference.score(_truncated(reference, query)))
        assert scores == pytest.approx(dict(enumerate(expected)), abs=1e-5)
        assert response.headers["x-truncated-documents"] == "1"
        assert response.headers["x-ignored-fields"] == "instruction"


def _truncated(reference: Pairs, query: str) -> list[int]:
    """The pair with as many of one word as fit."""
    return [*reference.ids(query, "gzip " * 500)[: POSITIONS - 1], reference.sep]


def test_a_batch(ray_folder: str, tmp_path: Path) -> None:
    folder = modernbert_mean(tmp_path / "model")
    reference = Pairs(folder)
    rows = [{"id": i, "query": QUERIES[i % 2], "documents": DOCUMENTS[: 2 + i % 6]} for i in range(40)]
    write_lines(tmp_path / "in.jsonl", rows)
    options = ("--model", folder, "--device", "cpu", "--precision", "float32", "--part-bytes", "1000")
    command = [sys.executable, "-m", "deploy.ray_batch"]
    cli("in.jsonl", "out", *options, cwd=tmp_path, command=command, env={"RAY_TMPDIR": ray_folder})
    found = [row for path in sorted((tmp_path / "out").glob("part-*.jsonl")) for row in read_lines(path)]
    assert [row["id"] for row in found] == list(range(40))
    for row, source in zip(found, rows, strict=True):
        texts: Any = source["documents"]
        expected = {i: sigmoid(reference.logit(str(source["query"]), text)) for i, text in enumerate(texts)}
        assert {result["index"]: result["score"] for result in row["results"]} == pytest.approx(expected, abs=1e-5)
