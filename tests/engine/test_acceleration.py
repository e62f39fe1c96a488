"""The accelerated paths on the CPU, where inductor compiles to C++."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import random
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from benchmarks.card import Card
from reranker import Scorer
from reranker.engine import acceleration, warmup
from reranker.engine.acceleration import accelerate, compile_layer_fns, sample
from reranker.engine.batch import PackedBatch
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


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> Model:
    return Scorer.load(model_path, device="cpu", precision="float32").model


@pytest.fixture
def model(loaded: Model) -> Model:
    return copy.copy(loaded)


def paths(monkeypatch: pytest.MonkeyPatch, record: Callable[[Model], str], layers: Callable[[Model], str]) -> None:
    """Replace how passes are recorded, and how layers are compiled."""
    monkeypatch.setattr(acceleration, "record_passes", record)
    monkeypatch.setattr(acceleration, "compile_layers", lambda model, seconds: layers(model))


def fail(error: Exception) -> Callable[[Model], str]:
    def set_up(model: Model) -> str:
        raise error

    return set_up


@pytest.mark.parametrize(
    ("set_up", "reason"),
    [
        (lambda model: "hidden states differ from the eager path's by 40%", "by 40%"),
        (fail(ZeroDivisionError("division by zero")), "ZeroDivisionError: division by zero"),
        (fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")), "MAX_MEMORY_PERCENTAGE"),
        (fail(RuntimeError("Triton Error [CUDA]: out of memory")), "MAX_MEMORY_PERCENTAGE"),
    ],
)
def test_a_path_that_fails_its_checks_is_logged_and_not_used(
    model: Model,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    set_up: Callable[[Model], str],
    reason: str,
) -> None:
    paths(monkeypatch, set_up, set_up)
    with caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch), 60)
    assert model.compiled is None
    assert model.graphs is None
    assert len(caplog.messages) == 2
    for path in ("compiled layers", "CUDA graphs"):
        assert [m for m in caplog.messages if m.startswith(f"{path}: not used (") and reason in m and "\n" not in m]


@pytest.mark.parametrize("path", ["graphs", "layers"])
def test_a_device_that_is_lost_ends_the_load(model: Model, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """The eager path would fail too, with an error that says less."""
    broken = fail(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: broken(model))
    paths(monkeypatch, *((broken, lambda model: "") if path == "graphs" else (lambda model: "", broken)))
    with pytest.raises(torch.AcceleratorError):
        accelerate(cuda(model, monkeypatch), 60)


def test_a_pass_that_cannot_be_recorded_does_not_end_the_load(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its error is of the same class as a lost device's, but the device works afterwards."""
    error = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nand more")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    paths(monkeypatch, fail(error), lambda model: "")
    with caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch), 60)
    assert "CUDA graphs: not used (AcceleratorError: CUDA error: operation not permitted when stream" in caplog.text
    assert "compiled layers: used" in caplog.text


def test_what_failed_in_the_compilers_thread_holds_no_tensors() -> None:
    """Without the garbage collector: the memory that was missing must be free for what follows."""
    held: list[weakref.ref[torch.Tensor]] = []

    def work() -> None:
        activations = torch.ones(1)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    gc.collect()
    gc.disable()
    try:
        with contextlib.suppress(torch.OutOfMemoryError):
            acceleration._run_within(60, work)
        assert held[0]() is None
    finally:
        gc.enable()


def test_the_error_of_the_compilers_thread_is_raised() -> None:
    with pytest.raises(torch.AcceleratorError):
        acceleration._run_within(60, lambda: fail(torch.AcceleratorError("CUDA error: unspecified"))(None))  # type: ignore[arg-type]


def test_passes_are_recorded_although_the_compiler_is_late(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Before it starts: the late compiler still launches kernels."""
    over, order, graphs = threading.Event(), list[str](), object()

    def record(model: Model) -> str:
        order.append("recorded")
        monkeypatch.setattr(model, "graphs", graphs, raising=False)
        return ""

    def late(*args: object) -> LayerFns:
        order.append("compiled")
        return LayerFns(lambda *args: over.wait(60), EAGER.after)  # type: ignore[arg-type]

    monkeypatch.setattr(acceleration, "record_passes", record)
    monkeypatch.setattr(acceleration, "compile_layer_fns", late)
    monkeypatch.setattr(PackedBatch, "to", lambda batch, device: batch)
    try:
        with caplog.at_level(logging.INFO):
            accelerate(cuda(model, monkeypatch), 0.01)
        assert "compiled layers: not used (not ready within 0 s)" in caplog.text
        assert "CUDA graphs: used" in caplog.text
        assert (order, model.graphs, model.compiled) == (["recorded", "compiled"], graphs, None)
    finally:
        over.set()
        for thread in threading.enumerate():
            if thread.name == "compile":
                thread.join()


def test_compiled_layers_are_recorded_in_place_of_the_eager_ones(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    recorded: list[tuple[LayerFns | None, object]] = []

    def record(model: Model) -> str:
        recorded.append((model.compiled, model.graphs))
        monkeypatch.setattr(model, "graphs", f"recording {len(recorded)}", raising=False)
        return ""

    def layers(model: Model) -> str:
        monkeypatch.setattr(model, "compiled", EAGER, raising=False)
        return ""

    paths(monkeypatch, record, layers)
    with caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch), 60)
    assert recorded == [(None, None), (EAGER, None)], "the memory of the first is free when the second begins"
    assert model.graphs == "recording 2"  # type: ignore[comparison-overlap]
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "CUDA graphs",
        "compiled layers",
        "CUDA graphs of the compiled layers",
    ]


@pytest.mark.parametrize(("load_timeout", "limit"), [(1800.0, 300.0), (720.0, 120.0)])
def test_the_compilers_limit_is_a_share_of_the_load_timeout(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, load_timeout: float, limit: float
) -> None:
    limits: list[float] = []
    monkeypatch.setattr(warmup, "accelerate", lambda model, seconds: limits.append(seconds))
    Scorer.load(model_path, device="cpu", precision="float32", load_timeout=load_timeout)
    assert limits == [pytest.approx(limit)]


def test_compiled_layers_that_compute_something_else_are_refused(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = LayerFns(EAGER.before, lambda layer, x, attended: EAGER.after(layer, x, attended.roll(1, 1)))
    monkeypatch.setattr(acceleration, "compile_layer_fns", lambda eager: wrong)
    monkeypatch.setattr(acceleration, "_COMPARED_TOKENS", 512)
    assert "hidden states differ" in acceleration.compile_layers(model, 60)
    assert model.compiled is None
    monkeypatch.setattr(acceleration, "compile_layer_fns", lambda eager: LayerFns(*map(_same, EAGER)))  # type: ignore[arg-type]
    monkeypatch.setattr(acceleration, "slower", lambda fast, eager: "")  # both are equally fast, except by chance
    assert acceleration.compile_layers(model, 60) == ""
    assert model.compiled is not None


def _same(function: object) -> object:
    return lambda *args: function(*args)  # type: ignore[operator]


def test_torchs_own_switch_turns_them_off(
    model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with torch._dynamo.config.patch(disable=True), caplog.at_level(logging.INFO):
        accelerate(cuda(model, monkeypatch), 60)
    assert caplog.messages == ["compiled layers and CUDA graphs: off (TORCH_COMPILE_DISABLE=1)"]


def test_a_cpu_uses_neither(model: Model, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        accelerate(model, 60)
    assert not caplog.messages
    assert model.compiled is None
