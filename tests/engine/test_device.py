from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from reranker.engine import device as devices
from reranker.engine import driver
from reranker.errors import DeviceLostError, ModelLoadError
from reranker.server.gpus import memory_share
from tests.gpus import Gpu, Machine

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def gpu(monkeypatch: pytest.MonkeyPatch, count: int = 2) -> None:
    """A machine with GPUs; without a driver's files, see test_driver.py."""
    Machine([Gpu(f"GPU-{index}") for index in range(count)]).install(monkeypatch)
    monkeypatch.setattr(driver, "why_no_cuda", lambda: "")


def test_auto_takes_the_gpu_and_falls_back_to_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert devices.choose_device("auto") == devices.Choice(CUDA, "auto: Test GPU GPU-0")
    gpu(monkeypatch, count=0)
    assert devices.choose_device("auto") == devices.Choice(CPU, "auto: no CUDA device")


def test_the_error_for_an_absent_device_says_how_to_fix_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch)
    assert devices.choose_device("cuda:1") == devices.Choice(torch.device("cuda", 1), "requested: Test GPU GPU-1")
    with pytest.raises(ModelLoadError, match=r"cuda:2 does not exist: 2 CUDA device"):
        devices.choose_device("cuda:2")
    gpu(monkeypatch, count=0)
    with pytest.raises(ModelLoadError, match="set MODEL_DEVICE=auto or cpu"):
        devices.choose_device("cuda")
    with pytest.raises(ModelLoadError, match="use auto, cpu, cuda"):
        devices.choose_device("tpu")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nand more"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError('NVML_SUCCESS == r INTERNAL ASSERT FAILED at "CUDACachingAllocator.cpp"'),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"),
]
LOST = [
    torch.AcceleratorError("CUDA error: device-side assert triggered"),
    torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("CUDA driver error: unspecified launch failure"),
]
OTHER = [
    RuntimeError("expected m1 and m2 to have the same dtype"),
    NotImplementedError("Could not run 'aten::mm' with arguments from the 'Fake' backend"),
    ValueError("out of memory"),
]


@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *LOST, *OTHER], ids=str)
def test_errors_of_memory_and_of_a_lost_device_are_told_from_others(error: Exception) -> None:
    assert devices.out_of_memory(error) == (error in OUT_OF_MEMORY)
    assert devices.lost(error) == (error in LOST)


def while_loading(error: Exception) -> str:
    with pytest.raises(ModelLoadError) as caught, devices.load_errors():
        raise error
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_load_ends_with_one_line() -> None:
    for error in OUT_OF_MEMORY:
        assert "raise MAX_MEMORY_PERCENTAGE, free memory, or use a smaller model" in while_loading(error)
    for error in LOST:
        assert f"the device failed while the model was loaded ({error})" in while_loading(error)
        scored = DeviceLostError("the device failed and the worker restarts; try again")
        scored.__cause__ = error
        assert f"({error})" in while_loading(scored)
    for other in OTHER:
        with pytest.raises(type(other)), devices.load_errors():
            raise other


def test_workers_that_share_a_gpu_fit_beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loads, measures, and takes all it may: torch's allocator refuses more than its cap."""
    total, caps, held = 16 << 30, list[float](), list[int]()
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: caps.append(share))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - sum(held), total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    for percentage, workers, expected in [(90, 2, 45), (90, 3, 30), (40, 2, 40), (98, 2, 49), (98, 1, 98), (50, 1, 50)]:
        caps.clear()
        held.clear()
        for _ in range(workers):
            share = memory_share(percentage, workers)
            devices.cap_memory(CUDA, share)
            held.append(devices.memory(CUDA, share).available)
        assert caps == [pytest.approx(expected / 100)] * workers
        assert held == [pytest.approx(total * expected / 100)] * workers
        assert sum(held) <= total


def test_a_second_model_of_a_process_finds_the_memory_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate --model A --model B`: else B is refused, or takes 8 bits, because of what A left in the allocator."""
    left = [60]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100 - sum(left), 100))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: sum(left))
    monkeypatch.setattr(torch.cuda, "empty_cache", left.clear)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: None)
    assert devices.memory(CUDA, 90).available == 30
    devices.cap_memory(CUDA, 90)
    assert devices.memory(CUDA, 90).available == 90


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
