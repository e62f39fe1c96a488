"""Choose the device and measure its memory; every automatic choice carries its reason, for the log."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from reranker.cgroup import memory_limit
from reranker.errors import ModelLoadError

_GIB = 1 << 30
T = TypeVar("T")


class Choice(NamedTuple, Generic[T]):
    """A value and why it was chosen."""

    value: T
    reason: str


def choose_device(wanted: str) -> Choice[torch.device]:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        ModelLoadError: the name is unknown, or this CUDA device does not exist.
    """
    if wanted == "cpu":
        return Choice(torch.device("cpu"), "requested")
    if wanted == "auto" and not torch.cuda.is_available():
        return Choice(torch.device("cpu"), "auto: no CUDA device")
    if not re.fullmatch(r"auto|cuda(:\d+)?", wanted):
        raise ModelLoadError(f"MODEL_DEVICE={wanted!r} is not known: use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        fix = "set MODEL_DEVICE=auto or cpu, or fix the driver"
        raise ModelLoadError(f"MODEL_DEVICE={wanted} cannot be used: {why}; {fix}")
    index, count = int(wanted.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise ModelLoadError(f"MODEL_DEVICE={wanted} does not exist: {count} CUDA device(s) visible")
    source = "auto" if wanted == "auto" else "requested"
    return Choice(torch.device("cuda", index), f"{source}: {torch.cuda.get_device_name(index)}")


@dataclass(frozen=True, slots=True)
class Memory:
    """A device's memory in bytes: all of it, the share this process may use, and the part it uses."""

    total: int
    allowed: int
    used: int

    @property
    def available(self) -> int:
        """Bytes that this process may still allocate."""
        return max(0, self.allowed - self.used)

    def __str__(self) -> str:
        return f"{self.available / _GIB:.1f} GiB available of {self.allowed / _GIB:.1f} GiB allowed"


def memory(device: torch.device, percentage: float) -> Memory:
    """Measure the device's memory; `allowed` is at most `percentage` of the total and at most what is free."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        import psutil  # not installed on every GPU machine, nor needed there

        machine = psutil.virtual_memory()
        free, total = machine.available, min(machine.total, memory_limit() or machine.total)
    used = memory_held(device)
    return Memory(total, min(int(total * percentage / 100), free + used), used)


def memory_held(device: torch.device) -> int:
    """Return the bytes that this process holds on the device; cheap enough to call after every forward pass."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def cap_memory(device: torch.device, percentage: float) -> None:
    """Make CUDA's allocator refuse more than `percentage` of the memory; the CPU's has no such limit."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(percentage / 100, device)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch says so; also an NVML assert (under MIG) and the CPU allocator's plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        text in str(error) for text in ("NVML_SUCCESS == r", "DefaultCPUAllocator", "CUDA error: out of memory")
    )
