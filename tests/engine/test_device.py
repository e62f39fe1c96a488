from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from reranker.engine import device as devices
from reranker.errors import ModelLoadError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def gpu(monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
    """A machine with GPUs, as far as `choose_device` can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")


def test_auto_takes_the_gpu_and_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert devices.choose_device("auto") == devices.Choice(CUDA, "auto: Test GPU")
    gpu(monkeypatch, count=0)
    assert devices.choose_device("auto") == devices.Choice(CPU, "auto: no CUDA device")


def test_the_error_for_an_absent_device_says_how_to_fix_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert devices.choose_device("cuda:1") == devices.Choice(torch.device("cuda", 1), "requested: Test GPU")
    with pytest.raises(ModelLoadError, match=r"cuda:2 does not exist: 2 CUDA device"):
        devices.choose_device("cuda:2")
    gpu(monkeypatch, count=0)
    with pytest.raises(ModelLoadError, match="set MODEL_DEVICE=auto or cpu"):
        devices.choose_device("cuda")
    with pytest.raises(ModelLoadError, match="use auto, cpu, cuda"):
        devices.choose_device("tpu")


def test_memory_of_the_cpu_is_capped_by_percentage_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * gib, available=10 * gib))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=gib)))
    monkeypatch.setattr(devices, "memory_limit", lambda: None)
    assert devices.memory(CPU, 50) == devices.Memory(total=16 * gib, allowed=8 * gib, used=gib)
    assert devices.memory(CPU, 50).available == 7 * gib
    assert devices.memory(CPU, 100).allowed == 11 * gib  # at most what is free
    monkeypatch.setattr(devices, "memory_limit", lambda: 4 * gib)
    assert devices.memory(CPU, 50).allowed == 2 * gib
    assert str(devices.memory(CPU, 50)) == "1.0 GiB available of 2.0 GiB allowed"


def test_memory_of_the_gpu_counts_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    assert devices.memory(CUDA, 90) == devices.Memory(total=100, allowed=40, used=10)
    assert devices.memory(CUDA, 20) == devices.Memory(total=100, allowed=20, used=10)
