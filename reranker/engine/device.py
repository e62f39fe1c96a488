"""Which device and precision, and how much memory: every automatic choice comes with its reason, for the log."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from reranker.errors import ModelLoadError

PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8": torch.float8_e4m3fn,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
QUANTIZED = {torch.int8: torch.float32, torch.float8_e4m3fn: torch.bfloat16}
"""Precisions of the layers' products alone, and the precision of everything between them."""
_GIB = 1 << 30
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Choice(Generic[T]):
    """A value and why it was chosen."""

    value: T
    reason: str


def choose_device(wanted: str) -> Choice[torch.device]:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device.

    Raises:
        ModelLoadError: CUDA was asked for and is not there, or not that device.
    """
    if wanted == "cpu":
        return Choice(torch.device("cpu"), "asked for")
    if wanted == "auto" and not torch.cuda.is_available():
        return Choice(torch.device("cpu"), "auto: no CUDA device")
    if not re.fullmatch(r"auto|cuda(:\d+)?", wanted):
        raise ModelLoadError(f"MODEL_DEVICE={wanted!r} is not known: use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        raise ModelLoadError(
            f"MODEL_DEVICE={wanted} cannot be used: {why}; set MODEL_DEVICE=auto or cpu, or fix the driver"
        )
    index = int(wanted.partition(":")[2] or 0)
    if index >= torch.cuda.device_count():
        raise ModelLoadError(
            f"MODEL_DEVICE={wanted} does not exist: {torch.cuda.device_count()} CUDA device(s) visible"
        )
    name = torch.cuda.get_device_name(index)
    return Choice(torch.device("cuda", index), f"{'auto: ' if wanted == 'auto' else 'asked for: '}{name}")


def choose_precisions(wanted: str, device: torch.device) -> list[Choice[torch.dtype]]:
    """The precisions to try, best first; a later one is for when a warm-up score is not finite or a type is missing."""
    if wanted == "auto":
        if device.type == "cpu":
            if torch.cpu._is_amx_tile_supported():
                return [
                    Choice(torch.bfloat16, "auto: the processor multiplies bfloat16 in hardware (AMX)"),
                    Choice(torch.float32, "bfloat16 failed"),
                ]
            return [Choice(torch.float32, "auto: fastest on this processor (no AMX)")]
        # Emulated bfloat16 does not count: it is slower than float16.
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return [
                Choice(torch.bfloat16, "auto: the GPU has bfloat16"),
                Choice(torch.float32, "bfloat16 failed"),
            ]
        return [Choice(torch.float16, "auto: the GPU has no bfloat16"), Choice(torch.float32, "float16 failed")]
    first = PRECISIONS[wanted]
    if first in QUANTIZED:
        instead = choose_precisions("auto", device)
        if missing := _missing(first, device):
            best = instead[0]
            return [Choice(best.value, f"{wanted} was asked for, which {missing}; {best.reason}"), *instead[1:]]
        return [Choice(first, "asked for"), *(Choice(c.value, f"{short(first)} failed") for c in instead)]
    choices = [Choice(first, "asked for")]
    if first is torch.bfloat16 and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        choices = [Choice(torch.float16, "bfloat16 was asked for, the GPU has none")]
    if first is not torch.float32:
        choices.append(Choice(torch.float32, f"{short(choices[0].value)} failed"))
    return choices


def _missing(quantized: torch.dtype, device: torch.device) -> str:
    """What a device lacks for a quantised precision, or nothing."""
    if quantized is torch.int8:
        return "" if device.type == "cpu" else "is for the CPU only"
    if device.type != "cuda":
        return "is for NVIDIA GPUs only"
    # torch's _scaled_mm takes a scale for each row from here on; the proof at load (quantized.py) has the last word.
    return "" if torch.cuda.get_device_capability(device) >= (8, 9) else "needs compute capability 8.9 (Ada, Hopper)"


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16'; torch.float8_e4m3fn -> 'float8'"""
    return str(dtype).removeprefix("torch.").removesuffix("_e4m3fn")


@dataclass(frozen=True, slots=True)
class Memory:
    """What this process may use of a device's memory, in bytes."""

    total: int
    allowed: int
    used: int

    @property
    def left(self) -> int:
        """Bytes that may still be taken."""
        return max(0, self.allowed - self.used)

    def __str__(self) -> str:
        return f"{self.left / _GIB:.1f} GiB left of {self.allowed / _GIB:.1f} GiB allowed"


def memory(device: torch.device, percentage: float) -> Memory:
    """Memory of the device and of this process on it, under a cap of `percentage` of the total."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_reserved(device)
        allowed = min(int(total * percentage / 100), free + used)
    else:
        import psutil  # a GPU needs none of it

        total = min(psutil.virtual_memory().total, _cgroup_limit())
        used = psutil.Process().memory_info().rss
        allowed = min(int(total * percentage / 100), psutil.virtual_memory().available + used)
    return Memory(total, allowed, used)


def memory_held(device: torch.device) -> int:
    """Bytes that this process holds on the device; cheap enough to ask after every forward pass."""
    if device.type == "cuda":
        return int(torch.cuda.memory_reserved(device))
    import psutil

    return int(psutil.Process().memory_info().rss)


def _cgroup_limit() -> int:
    """The container's memory limit in bytes (cgroup v2, then v1); without one, more than any machine has."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(path).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return 1 << 62


def cap_memory(device: torch.device, percentage: float) -> None:
    """Make the allocator refuse more than `percentage` of the device's memory. The CPU has no such switch."""
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(percentage / 100, device)
