from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from reranker.engine import device as devices
from reranker.errors import ModelLoadError

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def gpu(monkeypatch: pytest.MonkeyPatch, count: int = 2, capability: tuple[int, int] = (9, 0)) -> None:
    """A machine with GPUs, as far as the choices can see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Test GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_auto_takes_the_gpu_and_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert devices.choose_device("auto") == devices.Choice(CUDA, "auto: Test GPU")
    gpu(monkeypatch, count=0)
    assert devices.choose_device("auto") == devices.Choice(CPU, "auto: no CUDA device")


def test_a_device_that_is_not_there_is_an_error_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert devices.choose_device("cuda:1").value == torch.device("cuda", 1)
    with pytest.raises(ModelLoadError, match=r"cuda:2 does not exist: 2 CUDA device"):
        devices.choose_device("cuda:2")
    gpu(monkeypatch, count=0)
    with pytest.raises(ModelLoadError, match="set MODEL_DEVICE=auto or cpu"):
        devices.choose_device("cuda")
    with pytest.raises(ModelLoadError, match="use auto, cpu, cuda"):
        devices.choose_device("tpu")


def types(choices: list[devices.Choice[torch.dtype]]) -> list[str]:
    return [devices.short(choice.value) for choice in choices]


def test_precision_by_what_the_hardware_has(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert types(devices.choose_precisions("auto", CUDA)) == ["bfloat16", "float32"]
    gpu(monkeypatch, capability=(7, 5))
    assert types(devices.choose_precisions("auto", CUDA)) == ["float16", "float32"]
    fallback = devices.choose_precisions("bf16", CUDA)
    assert types(fallback) == ["float16", "float32"]
    assert "the GPU has none" in fallback[0].reason
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert types(devices.choose_precisions("auto", CPU)) == ["float32"]
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert types(devices.choose_precisions("auto", CPU)) == ["bfloat16", "float32"]


@pytest.mark.parametrize(("wanted", "first"), [("fp16", "float16"), ("bfloat16", "bfloat16"), ("fp32", "float32")])
def test_a_precision_that_was_asked_for_is_tried_first(wanted: str, first: str) -> None:
    got = types(devices.choose_precisions(wanted, CPU))
    assert got[0] == first
    assert got[-1] == "float32"
    assert len(got) == len(set(got))


def test_memory_of_the_cpu_is_capped_by_percentage_and_container(monkeypatch: pytest.MonkeyPatch) -> None:
    gib = 1 << 30
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * gib, available=10 * gib))
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=gib)))
    monkeypatch.setattr(devices, "_cgroup_limit", lambda: 1 << 62)
    assert devices.memory(CPU, 50).allowed == 8 * gib
    assert devices.memory(CPU, 50).left == 7 * gib
    assert devices.memory(CPU, 100).allowed == 11 * gib  # no more than is free
    monkeypatch.setattr(devices, "_cgroup_limit", lambda: 4 * gib)
    assert devices.memory(CPU, 50).allowed == 2 * gib
    assert str(devices.memory(CPU, 50)) == "1.0 GiB left of 2.0 GiB allowed"


def test_memory_of_the_gpu_counts_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30, 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 10)
    assert devices.memory(CUDA, 90) == devices.Memory(total=100, allowed=40, used=10)
    assert devices.memory(CUDA, 20) == devices.Memory(total=100, allowed=20, used=10)
