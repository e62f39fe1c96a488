"""The optional paths on the CPU, where inductor compiles to C++: equal to the card, once for all layers and sizes."""

from __future__ import annotations

import logging
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from reranker import Scorer
from reranker.engine import acceleration as speedup
from reranker.engine.acceleration import accelerate, compiled_stages, sample
from reranker.engine.families.qwen3 import PLAIN, LayerFns
from reranker.engine.model import Model
from tests.engine.card import Card
from tests.engine.test_scorer import expected, packed, requests, worst


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_layers_equal_the_card_and_compile_once(
    model_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer.load(model_path, device="cpu", precision="float32")
    model = scorer.model
    compiled, ran = compiled_stages(), []
    counters.clear()
    with torch.inference_mode():  # in another thread, as at a start, and for a size of its own
        assert speedup._in_time(3600, lambda: model.hidden(sample(1000, model), compiled)) == ""
        assert speedup._in_time(3600, lambda: ran.append(inductor.compile_threads)) == ""
    assert ran.pop() == 1  # what is set here is set there
    assert counters["stats"]["unique_graphs"] == 2
    model.stages = LayerFns(
        lambda *args: ran.append(1) or compiled.before(*args),  # type: ignore[func-returns-value]
        compiled.after,
    )
    rng = random.Random(19)
    for count in (1, 1, 2, 4):
        group = requests(rng, count, documents=2 if count == 1 else 5)
        assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 1e-4
    assert len(ran) == 4 * 3
    assert counters["stats"]["unique_graphs"] == 2  # three layers and five sizes later
    assert not counters["graph_break"]
    # What was compiled is what ran: not the plain functions behind the compiler's back.
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        model.hidden(sample(200, model), compiled)


def cuda(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model as `accelerate` would find it on a GPU, as far as the choices can see."""
    monkeypatch.setattr(model, "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return model


@pytest.fixture
def model(model_path: Path) -> Model:
    return Scorer.load(model_path, device="cpu", precision="float32").model


@pytest.mark.parametrize(
    ("set_up", "reason"),
    [
        (lambda model: "hidden states differ by 40% from the plain way's", "differ by 40%"),
        (lambda model: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_path_that_does_not_hold_is_named_and_not_taken(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, set_up: object, reason: str
) -> None:
    monkeypatch.setattr(speedup, "compile_layers", set_up)
    monkeypatch.setattr(speedup, "record_passes", set_up)
    with caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch))
    assert model.stages is PLAIN
    assert model.graphs is None
    for path in ("compiled layers", "CUDA graphs"):
        assert [m for m in caplog.messages if m.startswith(f"{path}: not used (") and reason in m]


def test_while_a_compiler_that_was_left_behind_still_runs_nothing_is_recorded(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over, recorded = threading.Event(), []
    monkeypatch.setattr(speedup, "compile_layers", lambda model: speedup._in_time(0.01, lambda: over.wait(30)))
    monkeypatch.setattr(speedup, "record_passes", lambda model: recorded.append(1) or "")  # type: ignore[func-returns-value]
    try:
        with caplog.at_level(logging.INFO):
            accelerate(cuda(model, monkeypatch))
        assert "compiled layers: not used (not ready within 0 s)" in caplog.text
        assert "CUDA graphs: not used (the compiler is not done yet)" in caplog.text
        assert recorded == []
    finally:
        over.set()
        while speedup._compiling():
            time.sleep(0.001)


def test_compiled_layers_that_compute_something_else_are_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = LayerFns(PLAIN.before, lambda layer, x, attended: PLAIN.after(layer, x, attended.roll(1, 1)))
    monkeypatch.setattr(speedup, "compiled_stages", lambda: wrong)
    monkeypatch.setattr(speedup, "_COMPARED_TOKENS", 512)
    assert "differ by" in speedup.compile_layers(model)
    assert model.stages is PLAIN
    monkeypatch.setattr(speedup, "compiled_stages", lambda: LayerFns(*map(_same, PLAIN)))  # type: ignore[arg-type]
    assert speedup.compile_layers(model) == ""
    assert model.stages is not PLAIN


def _same(function: object) -> object:
    return lambda *args: function(*args)  # type: ignore[operator]


def test_torchs_own_switch_turns_them_off(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with torch._dynamo.config.patch(disable=True), caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch))
    assert caplog.messages == ["compiled layers and CUDA graphs: off (TORCH_COMPILE_DISABLE=1)"]


def test_a_cpu_tries_neither(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        accelerate(model)
    assert not caplog.messages
    assert model.stages is PLAIN
