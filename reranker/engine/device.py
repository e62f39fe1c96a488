"""Choose the device and measure its memory; every automatic choice carries its reason, for the log."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch

from reranker.cgroup import memory_limit
from reranker.engine import driver
from reranker.engine.checkpoint.files import first_line
from reranker.errors import DeviceLostError, ModelLoadError

logger = logging.getLogger(__name__)

MORE_MEMORY = "raise MAX_MEMORY_PERCENTAGE, free memory, or use a smaller model"
_GIB = 1 << 30
_OUT_OF_MEMORY = (
    *("CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"),
    *("CUBLAS_STATUS_ALLOC_FAILED", "NVML_SUCCESS == r", "DefaultCPUAllocator"),
)
_LOST = ("an illegal memory access", "a misaligned address", "unspecified launch failure", "device-side assert")
"""Errors of Triton's and other launches, which are no AcceleratorError."""
T = TypeVar("T")


class Choice(NamedTuple, Generic[T]):
    """A value and why it was chosen."""

    value: T
    reason: str


def choose_device(wanted: str) -> Choice[torch.device]:
    """Resolve `auto`, `cpu`, `cuda` or `cuda:N`; `auto` warns about a GPU that is there and cannot be used.

    Raises:
        ModelLoadError: the name is unknown, or this CUDA device does not exist or cannot be used.
    """
    if wanted == "cpu":
        return Choice(torch.device("cpu"), "requested")
    if wanted == "auto":
        return _best_device()
    if not re.fullmatch(r"cuda(:\d+)?", wanted):
        raise ModelLoadError(f"MODEL_DEVICE={wanted!r} is not known: use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        why = driver.why_no_cuda() or why
        raise ModelLoadError(f"MODEL_DEVICE={wanted} cannot be used: {why}; or set MODEL_DEVICE=auto or cpu")
    index, count = int(wanted.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise ModelLoadError(f"MODEL_DEVICE={wanted} does not exist: {count} CUDA device(s) visible")
    if problem := driver.unsupported(index):
        raise ModelLoadError(f"MODEL_DEVICE={wanted} cannot be used: {problem}; or set MODEL_DEVICE=auto or cpu")
    return Choice(torch.device("cuda", index), f"requested: {torch.cuda.get_device_name(index)}")


def _best_device() -> Choice[torch.device]:
    usable = driver.usable_gpus()
    if usable:
        return Choice(torch.device("cuda", usable[0]), f"auto: {torch.cuda.get_device_name(usable[0])}")
    if problem := driver.unsupported(0) if torch.cuda.is_available() else driver.why_no_cuda():
        logger.warning("THE GPU IS NOT USED, the model runs on the CPU: %s", problem)
    without = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device"
    return Choice(torch.device("cpu"), f"auto: {'no usable CUDA device' if problem else without}")


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
    """Make CUDA's allocator refuse more than `percentage` of the memory; the CPU's has no such limit.

    What an earlier model of this process left in the allocator is given back, or `memory` would count it as in use.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(percentage / 100, device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch says so; also an NVML assert (under MIG) and the CPU allocator's plain RuntimeError."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _OUT_OF_MEMORY)
    )


def lost(error: BaseException) -> bool:
    """Whether every further call of this process on the device would fail too."""
    if out_of_memory(error):
        return False
    text = str(error)
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(part in text for part in _LOST)
    )


def works(device: torch.device) -> bool:
    """Whether a GPU still computes after an error: after that of a pass that cannot be recorded, for example."""
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:  # an error that is there to stay is raised by every call
        return False
    return True


@contextmanager
def load_errors() -> Iterator[None]:
    """Raise ModelLoadError, one line, for memory that ends and a device that fails at any stage of a load."""
    try:
        yield
    except (RuntimeError, DeviceLostError) as error:
        cause = error.__cause__ if isinstance(error, DeviceLostError) and error.__cause__ else error
        if out_of_memory(cause):
            raise ModelLoadError(
                f"out of memory while the model was loaded ({first_line(cause)}): {MORE_MEMORY}"
            ) from error
        if lost(cause) or isinstance(error, DeviceLostError):
            fix = "check it with nvidia-smi, then start again"
            raise ModelLoadError(
                f"the device failed while the model was loaded ({first_line(cause)}): {fix}"
            ) from error
        raise
