"""A machine with NVIDIA GPUs, as `torch.cuda` shows it: without torch, which a test may replace by `Machine`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest

WHEEL = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120")
"""`torch.cuda.get_arch_list()` of torch 2.13.0 with CUDA 13.0."""
OLD_WHEEL = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")


@dataclass(frozen=True)
class Gpu:
    """A GPU, or one of the MIG devices that a GPU is divided into."""

    uuid: str
    capability: tuple[int, int] = (9, 0)
    mig: tuple[str, ...] = ()


class Machine:
    """The functions of `torch.cuda` that the project asks about devices.

    Args:
        gpus: in the order of their indices.
        driver_is_old: CUDA does not start; NVML still counts the GPUs, and so does `device_count`.
        wheel: what torch has kernels for.
    """

    def __init__(self, gpus: Sequence[Gpu], *, driver_is_old: bool = False, wheel: Sequence[str] = WHEEL) -> None:
        self.gpus, self.driver_is_old, self.wheel = list(gpus), driver_is_old, list(wheel)

    def module(self) -> str:
        """The text of a module by the name of torch, for another process."""
        gpus = ", ".join(map(repr, self.gpus))
        return f"""
from types import SimpleNamespace
from tests.gpus import Gpu, Machine
cuda, version, __version__ = Machine([{gpus}]), SimpleNamespace(cuda="13.0"), "2.13.0+cu130"
"""

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Replace torch's functions by these."""
        import torch

        for name in ("is_available", "device_count", "get_arch_list", "get_device_capability", "get_device_name"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")

    def visible(self) -> list[Gpu]:
        """The devices of a process by CUDA's rules for CUDA_VISIBLE_DEVICES.

        An index, a UUID (its beginning is enough) or a MIG name each; the first unknown one ends the list, a repeated
        one empties it. A process sees one MIG device: the first.
        """
        names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(len(self.gpus))))).split(",")
        seen: list[Gpu] = []
        for name in map(str.strip, names):
            found = self._find(name)
            if found is None:
                break
            if found in seen:
                return []
            seen.append(found)
        divided = [gpu for gpu in seen if gpu.uuid.startswith("MIG-")]
        return divided[:1] or seen

    def _find(self, name: str) -> Gpu | None:
        if name.isdigit():
            found = self.gpus[int(name)] if int(name) < len(self.gpus) else None
            return Gpu(found.mig[0], found.capability) if found is not None and found.mig else found
        parts = [Gpu(mig, gpu.capability) for gpu in self.gpus for mig in gpu.mig]
        return next((gpu for gpu in [*self.gpus, *parts] if name and gpu.uuid.startswith(name)), None)

    def is_available(self) -> bool:
        return bool(self.visible()) and not self.driver_is_old

    def device_count(self) -> int:
        return len(self.visible())

    def get_arch_list(self) -> list[str]:
        return self.wheel

    def get_device_capability(self, index: Any) -> tuple[int, int]:
        return self.visible()[int(index)].capability

    def get_device_name(self, index: Any) -> str:
        return f"Test GPU {self.visible()[int(index)].uuid}"
