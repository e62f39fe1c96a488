"""The accelerated paths on the CPU, where inductor compiles to C++."""

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

from benchmarks.card import Card
from reranker import Scorer
from reranker.engine import acceleration
from reranker.engine.acceleration import accelerate, compile_layer_fns, sample
from reranker.engine.families.base import LayerFns
from reranker.engine.families.decoder import Decoder
from reranker.engine.model import Model
from tests.engine.test_scorer import expected, packed, requests, worst

EAGER = Decoder.eager


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
def test_compiled_layers_equal_the_card_and_compile_once(
    model_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = Scorer.load(model_path, device="cpu", precision="float32")
    model = scorer.model
    compiled, ran = compile_layer_fns(EAGER), []
    counters.clear()
    with torch.inference_mode():  # in another thread, as at a start, and for a size of its own
        assert acceleration._run_within(3600, lambda: model.hidden(sample(1000, model), compiled)) == ""
        assert acceleration._run_within(3600, lambda: ran.append(inductor.compile_threads)) == ""
    assert ran.pop() == 1  # the thread has the context's settings
    assert counters["stats"]["unique_graphs"] == 2
    model.compiled = LayerFns(
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
    # The compiled functions ran, not the eager ones without a notice.
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        model.hidden(sample(200, model), compiled)


def cuda(model: Model, monkeypatch: pytest.MonkeyPatch) -> Model:
    """The model with a GPU as its device, as far as `accelerate` looks."""
    monkeypatch.setattr(model, "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return model


@pytest.fixture
def model(model_path: Path) -> Model:
    return Scorer.load(model_path, device="cpu", precision="float32").model


@pytest.mark.parametrize(
    ("set_up", "reason"),
    [
        (lambda model: "hidden states differ from the eager path's by 40%", "by 40%"),
        (lambda model: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_path_that_fails_its_checks_is_logged_and_not_used(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, set_up: object, reason: str
) -> None:
    monkeypatch.setattr(acceleration, "compile_layers", set_up)
    monkeypatch.setattr(acceleration, "record_passes", set_up)
    with caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch))
    assert model.compiled is None
    assert model.graphs is None
    for path in ("compiled layers", "CUDA graphs"):
        assert [m for m in caplog.messages if m.startswith(f"{path}: not used (") and reason in m]


def test_nothing_is_recorded_while_a_late_compiler_runs(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    over, recorded = threading.Event(), []
    monkeypatch.setattr(
        acceleration, "compile_layers", lambda model: acceleration._run_within(0.01, lambda: over.wait(30))
    )
    monkeypatch.setattr(acceleration, "record_passes", lambda model: recorded.append(1) or "")  # type: ignore[func-returns-value]
    try:
        with caplog.at_level(logging.INFO):
            accelerate(cuda(model, monkeypatch))
        assert "compiled layers: not used (not ready within 0 s)" in caplog.text
        assert "CUDA graphs: not used (the compiler is still running)" in caplog.text
        assert recorded == []
    finally:
        over.set()
        while acceleration._compiling():
            time.sleep(0.001)


def test_compiled_layers_that_compute_something_else_are_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = LayerFns(EAGER.before, lambda layer, x, attended: EAGER.after(layer, x, attended.roll(1, 1)))
    monkeypatch.setattr(acceleration, "compile_layer_fns", lambda eager: wrong)
    monkeypatch.setattr(acceleration, "_COMPARED_TOKENS", 512)
    assert "hidden states differ" in acceleration.compile_layers(model)
    assert model.compiled is None
    monkeypatch.setattr(acceleration, "compile_layer_fns", lambda eager: LayerFns(*map(_same, EAGER)))  # type: ignore[arg-type]
    monkeypatch.setattr(acceleration, "slower", lambda fast, eager: "")  # both are equally fast, except by chance
    assert acceleration.compile_layers(model) == ""
    assert model.compiled is not None


def _same(function: object) -> object:
    return lambda *args: function(*args)  # type: ignore[operator]


def test_torchs_own_switch_turns_them_off(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with torch._dynamo.config.patch(disable=True), caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch))
    assert caplog.messages == ["compiled layers and CUDA graphs: off (TORCH_COMPILE_DISABLE=1)"]


def test_a_cpu_uses_neither(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        accelerate(model)
    assert not caplog.messages
    assert model.compiled is None
