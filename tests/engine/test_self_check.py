from __future__ import annotations

import json
import logging
import math
import shutil
from pathlib import Path

import pytest

from reranker import Scorer
from reranker.engine.self_check import self_check
from reranker.errors import InvalidRequestError
from reranker.types import EncodedRequest, RerankRequest, Slice
from tests.cli.command import cli
from tests.conftest import DEMO, Start, make_model
from tests.engine.checkpoints import tensors


def inverted(path: Path) -> Path:
    """The demo model with the sign of its last norm flipped, so that it ranks the wrong way."""
    shutil.copytree(DEMO, path)
    tensors(path, lambda f: f | {"model.norm.weight": -f["model.norm.weight"]})
    return path


def test_the_demo_passes_in_both_languages(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Scorer.load(device="cpu").info.self_check == "passed"
    assert "self-check" not in caplog.text


def test_a_model_that_ranks_the_wrong_way_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert Scorer.load(inverted(tmp_path / "m"), device="cpu").info.self_check == "failed: English, Chinese"
    [line] = [r.getMessage() for r in caplog.records if "self-check" in r.getMessage()]
    assert "does not behave like a reranker" in line


def test_equal_scores_are_no_pass(tmp_path: Path) -> None:
    """As of a model whose layers were saved as zeros."""
    path = make_model(tmp_path / "m", layers=1)
    tensors(path, lambda f: {n: t * ("embed" in n or n == "model.norm.weight") for n, t in f.items()})
    assert Scorer.load(path, device="cpu").info.self_check == "failed: English, Chinese"


class Stub:
    """A scorer with fixed logits that records its requests."""

    def __init__(self, logits: list[float], error: Exception | None = None) -> None:
        self.logits, self.error = logits, error
        self.requests: list[RerankRequest] = []

    def encode(self, request: RerankRequest) -> EncodedRequest:
        self.requests.append(request)
        if self.error:
            raise self.error
        return EncodedRequest([1], [[2], [3], [4]])

    def pack(self, slices: list[Slice]) -> list[Slice]:
        return slices

    def score(self, batch: list[Slice]) -> list[float]:
        return self.logits


def check(stub: Stub) -> str:
    return self_check(stub, "Find code")  # type: ignore[arg-type]


def test_it_asks_by_the_instruction_of_the_checkpoint() -> None:
    stub = Stub([1.0, 0.0, 0.5])
    assert check(stub) == "passed"
    assert [request.instruction for request in stub.requests] == ["Find code"] * 6


@pytest.mark.parametrize(
    "logits", [[0, 1, -1], [0, -1, 1], [1, 1, 0], [1, 0, 1], [math.nan, 0, 0], [math.inf, 0, 0], [1, 0, math.nan]]
)
def test_only_a_higher_finite_score_passes(logits: list[float]) -> None:
    assert check(Stub(logits)) == "failed: English, Chinese"


@pytest.mark.parametrize(("right", "wrong"), [("English", "Chinese"), ("Chinese", "English")])
def test_a_model_of_one_language_passes_for_it(right: str, wrong: str, caplog: pytest.LogCaptureFixture) -> None:
    answers = {"English": [1.0, 0.0, 0.0], "Chinese": [1.0, 0.0, 0.0]} | {wrong: [0.0, 1.0, 0.0]}
    stub = Stub([])

    def score(_: object) -> list[float]:
        return answers["English" if stub.requests[-1].query.isascii() else "Chinese"]

    stub.score = score  # type: ignore[method-assign, assignment]
    assert check(stub) == f"passed: {right} only"
    assert f"right in {right}, but not in {wrong}" in caplog.text


def test_without_room_it_is_not_run_and_the_start_goes_on() -> None:
    assert check(Stub([], InvalidRequestError("no room"))).startswith("not run")
    assert Scorer.load(device="cpu", max_seq_length=76).info.self_check.startswith("not run")


def test_everybody_is_told(tmp_path: Path, start: Start) -> None:
    path = inverted(tmp_path / "m")
    server = start(MODEL_NAME_OR_PATH=str(path))
    assert server.log.count("self-check failed (English, Chinese)") == 1
    assert server.client.get("/info").json()["self_check"] == "failed: English, Chinese"
    assert "reranker_self_check_failed_workers 1.0" in server.client.get("/metrics").text
    done = cli("check", "--model", path, cwd=tmp_path)
    assert json.loads(done.stdout)["self_check"] == "failed: English, Chinese"
    assert "self-check failed" in done.stderr
