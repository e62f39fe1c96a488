"""What a start says about drivers and GPUs, on machines that are faked."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from reranker.engine import device as devices
from reranker.engine import driver
from reranker.errors import ModelLoadError
from tests.gpus import OLD_WHEEL, WHEEL, Gpu, Machine

CPU = torch.device("cpu")
OPEN_MODULE = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder@U22)  \n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
)
CLOSED_MODULE = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"
    "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a driver: `version` and `nvidia0` in this folder would be its driver's and a GPU's node."""
    monkeypatch.setattr(driver, "_VERSION", tmp_path / "version")
    monkeypatch.setattr(driver, "_NODES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def refused(wanted: str) -> str:
    with pytest.raises(ModelLoadError) as caught:
        devices.choose_device(wanted)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def warned(caplog: pytest.LogCaptureFixture) -> str:
    """The warning of a start under `auto`, which takes the CPU."""
    with caplog.at_level(logging.INFO):
        choice = devices.choose_device("auto")
    assert choice == devices.Choice(CPU, "auto: no usable CUDA device")
    (warning,) = caplog.messages
    assert warning.startswith("THE GPU IS NOT USED, the model runs on the CPU: ")
    return warning


@pytest.mark.parametrize(("text", "version"), [(OPEN_MODULE, "580.95.05"), (CLOSED_MODULE, "535.183.01")])
def test_the_version_of_the_driver_is_read(host: Path, text: str, version: str) -> None:
    assert driver.driver_version() == ""
    (host / "version").write_text(text)
    assert driver.driver_version() == version
    (host / "version").write_text("something else")
    assert driver.driver_version() == "of an unknown version"


def test_an_old_driver_is_named_with_the_one_that_torch_needs(
    host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    Machine([Gpu("GPU-1"), Gpu("GPU-2")], driver_is_old=True).install(monkeypatch)
    assert torch.cuda.device_count() == 2, "as NVML counts"
    (host / "version").write_text(CLOSED_MODULE)
    (host / "nvidia0").touch()
    problem = "the NVIDIA driver is 535.183.01, torch 2.13.0+cu130 with CUDA 13.0 needs 580 or newer: update the driver"
    assert problem in warned(caplog)
    assert "docs/operations.md" in caplog.text
    assert problem in refused("cuda")
    assert problem in refused("cuda:1")
    assert driver.usable_gpus() == []
    assert devices.choose_device("cpu").value == CPU


@pytest.mark.parametrize(
    ("version", "nodes", "visible", "problem"),
    [
        (OPEN_MODULE, False, None, "no GPU is passed to this container or machine (no /dev/nvidia0; "),
        (OPEN_MODULE, True, "7", "CUDA_VISIBLE_DEVICES=7 names no usable GPU (the NVIDIA driver is 580.95.05, "),
        (OPEN_MODULE, True, None, "CUDA does not start (the NVIDIA driver is 580.95.05, torch 2.13.0+cu130 with CUDA"),
        ("", True, None, "CUDA does not start (the NVIDIA driver is not readable, torch 2.13.0+cu130 with CUDA 13.0"),
    ],
)
def test_a_gpu_that_is_there_and_not_usable_is_a_warning(
    host: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    version: str,
    nodes: bool,
    visible: str | None,
    problem: str,
) -> None:
    Machine([]).install(monkeypatch)
    if version:
        (host / "version").write_text(version)
    if nodes:
        (host / "nvidia0").touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert problem in warned(caplog)
    assert problem in refused("cuda")


@pytest.mark.parametrize("case", ["no driver", "hidden", "hidden by -1", "torch without CUDA"])
def test_without_a_gpu_that_is_wanted_nothing_is_said(
    host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    Machine([Gpu("GPU-1")] if "hidden" in case else []).install(monkeypatch)
    if case != "no driver":
        (host / "version").write_text(OPEN_MODULE)
        (host / "nvidia0").touch()
    if "hidden" in case:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1" if "-1" in case else "")
    if case == "torch without CUDA":
        monkeypatch.setattr(torch.version, "cuda", None)
    why = "this torch was built without CUDA" if case == "torch without CUDA" else "no CUDA device"
    with caplog.at_level(logging.INFO):
        assert devices.choose_device("auto") == devices.Choice(CPU, f"auto: {why}")
    assert not caplog.messages
    assert refused("cuda").startswith(f"MODEL_DEVICE=cuda cannot be used: {why}")


def test_a_gpu_that_the_wheel_has_no_kernels_for_is_not_used(
    host: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = Gpu("V100", capability=(7, 0))
    Machine([old]).install(monkeypatch)
    problem = f"V100 has compute capability 7.0, torch 2.13.0+cu130 has {', '.join(WHEEL)} only"
    assert problem in warned(caplog)
    assert problem in refused("cuda")
    assert driver.usable_gpus() == []
    Machine([old, Gpu("H100")]).install(monkeypatch)
    assert devices.choose_device("auto") == devices.Choice(torch.device("cuda", 1), "auto: Test GPU H100")
    assert "7.0" in refused("cuda:0")
    Machine([old], wheel=OLD_WHEEL).install(monkeypatch)
    assert devices.choose_device("cuda").value == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((7, 0), WHEEL, False),
        ((6, 1), WHEEL, False),
        ((7, 5), WHEEL, True),
        ((8, 7), WHEEL, True),  # by the kernels for 8.6
        ((8, 9), WHEEL, True),
        ((10, 3), WHEEL, True),
        ((11, 0), WHEEL, False),  # 10.0's kernels are for their major version
        ((12, 1), WHEEL, True),
        ((12, 0), OLD_WHEEL, False),
        ((12, 0), (*OLD_WHEEL, "compute_90"), True),  # translated by the driver
        ((9, 0), ("sm_90a",), True),
        ((10, 0), ("sm_90a",), False),
        ((7, 0), (), True),  # not known
        ((7, 0), ("gfx90a",), False),
    ],
)
def test_which_kernels_run_on_which_gpu(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], compiled: tuple[str, ...], runs: bool
) -> None:
    Machine([Gpu("GPU-1", capability)], wheel=compiled).install(monkeypatch)
    assert (driver.unsupported(0) == "") == runs
