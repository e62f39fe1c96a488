"""The NVIDIA driver and the GPUs of this machine, against what the installed torch needs of them.

It imports torch only: reranker/server/gpus.py asks it in a process of its own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import torch

_VERSION, _NODES = Path("/proc/driver/nvidia/version"), Path("/dev")
_OLDEST_DRIVER = {"11": 450, "12": 525, "13": 580}
"""By CUDA's major version, the driver's. Source: the table of minor version compatibility in NVIDIA's documentation."""


def driver_version() -> str:
    """Return the version of the loaded kernel module, such as 580.95.05; "" if there is none."""
    try:
        found = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", _VERSION.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    return found[0] if found else "of an unknown version"


def why_no_cuda() -> str:
    """Return why a machine with an NVIDIA driver has no usable CUDA device, and the way out; "" without a driver.

    Also "" where CUDA_VISIBLE_DEVICES hides all GPUs on purpose, and for a torch without CUDA.
    """
    version, nodes, cuda = driver_version(), any(_NODES.glob("nvidia[0-9]*")), torch.version.cuda
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cuda is None or not (version or nodes) or (visible is not None and visible.strip() in ("", "-1")):
        return ""
    oldest = _OLDEST_DRIVER.get(cuda.partition(".")[0])
    found = f"the NVIDIA driver is {version or 'not readable'}, torch {torch.__version__} with CUDA {cuda} needs "
    found += f"{oldest} or newer" if oldest else "a newer one"
    number = version.partition(".")[0]
    if oldest and number.isdigit() and int(number) < oldest:
        return f"{found}: update the driver, or install torch for an older CUDA (docs/operations.md, GPU)"
    if not nodes:
        return f"no GPU is passed to this container or machine (no /dev/nvidia0; {found}): docker run --gpus all"
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible} names no usable GPU ({found}): nvidia-smi -L shows the names"
    return f"CUDA does not start ({found}): nvidia-smi shows the state of driver and GPUs"


def unsupported(index: int) -> str:
    """Return why the installed torch cannot compute on a CUDA device, or ''."""
    compiled = torch.cuda.get_arch_list()
    if not compiled:  # not known
        return ""
    capability = torch.cuda.get_device_capability(index)
    if any(_runs(name, capability) for name in compiled):
        return ""
    name, has = torch.cuda.get_device_name(index), "{}.{}".format(*capability)
    fix = "install torch for an older CUDA (docs/operations.md, GPU)"
    return f"{name} has compute capability {has}, torch {torch.__version__} has {', '.join(compiled)} only: {fix}"


def usable_gpus() -> list[int]:
    """Return the indices of the CUDA devices that the installed torch can compute on."""
    if not torch.cuda.is_available():  # device_count may be NVML's, which counts devices that CUDA cannot use
        return []
    return [index for index in range(torch.cuda.device_count()) if not unsupported(index)]


def _runs(name: str, capability: tuple[int, int]) -> bool:
    """Whether kernels for `sm_86` run (same major, not newer), or those for `compute_86` can be translated."""
    found = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", name)
    if found is None:
        return False
    built = int(found[2]), int(found[3])
    if found[4] == "a":  # for this one only
        return built == capability
    return built <= capability and (found[1] == "compute" or built[0] == capability[0])
