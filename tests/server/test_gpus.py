"""Which GPUs the workers share out, and what each of them may take."""

from __future__ import annotations

import contextlib
import io
import logging
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest

import app
from config import load_settings
from reranker.engine.scorer import Scorer
from reranker.server import fleet, gpus
from tests.gpus import OLD_WHEEL, Gpu, Machine

TWO = [Gpu("GPU-0a"), Gpu("GPU-1b")]
OLD = Gpu("GPU-2c", capability=(7, 0))
DIVIDED = [Gpu("GPU-0a", mig=("MIG-1", "MIG-2")), Gpu("GPU-1b", mig=("MIG-3",))]


def usable_names(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names on a machine; what the process that counts runs is run in this one."""
    machine.install(monkeypatch)

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(command[-1], {})
        return SimpleNamespace(returncode=0, stdout=out.getvalue(), stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return gpus.usable_names()


@pytest.mark.parametrize(
    ("machine", "visible", "names"),
    [
        (Machine(TWO), None, ["0", "1"]),
        (Machine(TWO), "1", ["1"]),
        (Machine(TWO), "1, 0", ["1", "0"]),
        (Machine(TWO), "1,7,0", ["1"]),  # CUDA reads up to the first unknown one
        (Machine(TWO), "GPU-1b,GPU-0", ["GPU-1b", "GPU-0"]),
        (Machine(TWO), "", []),
        (Machine(TWO), "-1", []),
        (Machine([]), None, []),
        (Machine(TWO, driver_is_old=True), None, []),
        (Machine(TWO, driver_is_old=True), "0,1", []),
        (Machine([OLD]), None, []),
        (Machine([OLD], wheel=OLD_WHEEL), None, ["0"]),
        (Machine([*TWO, OLD]), None, ["0", "1"]),
        (Machine([OLD, *TWO]), "0,2", ["2"]),
        (Machine(DIVIDED), None, ["0"]),  # a process sees one MIG device
        (Machine(DIVIDED), "MIG-3", ["MIG-3"]),
        (Machine(DIVIDED), "MIG-1,MIG-2,MIG-3", ["MIG-1", "MIG-2", "MIG-3"]),
        (Machine(DIVIDED), "MIG-9,MIG-1", []),
        (Machine(DIVIDED, driver_is_old=True), "MIG-1,MIG-2", []),
    ],
)
def test_a_worker_is_started_for_every_gpu_that_can_be_used(
    machine: Machine, visible: str | None, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert usable_names(machine, monkeypatch) == names
    for name in names:  # and the worker, which sees that name alone, finds one GPU
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        assert machine.device_count() == 1


def test_a_count_that_fails_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    ended = SimpleNamespace(
        returncode=1, stdout="", stderr="Traceback ...\nImportError: libcudart.so.13: no such file\n"
    )
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: ended)
    assert gpus.usable_names() == []
    assert "the GPUs were not counted: ImportError: libcudart.so.13: no such file" in caplog.text


def test_the_service_loads_with_its_share_of_the_gpu_and_its_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(Scorer, "load", lambda **options: asked.append(options))
    monkeypatch.setenv("LOAD_TIMEOUT", "600")
    with caplog.at_level(logging.INFO):
        app.load_scorer(load_settings())
        assert "share this GPU" not in caplog.text
        monkeypatch.setattr(fleet, "context", fleet.WorkerContext(gpu_workers=2))
        app.load_scorer(load_settings())
    assert [(it["max_memory_percentage"], it["load_timeout"]) for it in asked] == [(90, 600), (45, 600)]
    assert (
        "2 workers share this GPU: each takes at most 45 % of its memory, not MAX_MEMORY_PERCENTAGE=90" in caplog.text
    )


def test_a_driver_that_hangs_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def run(command: list[str], **options: Any) -> SimpleNamespace:
        raise subprocess.TimeoutExpired(command, options["timeout"])

    monkeypatch.setattr(subprocess, "run", run)
    with caplog.at_level(logging.WARNING):
        assert gpus.usable_names() == []
    assert "the GPUs were not counted: no answer of the driver within 300 s" in caplog.text
