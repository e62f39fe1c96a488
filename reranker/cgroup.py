"""Processors and memory that the container allows: the affinity mask and the limits of its control group, v2 or v1.

OpenMP and psutil see the host. With one thread for each of a host's 64 cores, a container that may use two of them is
throttled most of the time.
"""

from __future__ import annotations

import os
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def cores(root: Path = _ROOT) -> int:
    """Return the whole processors that affinity and CPU quota allow, at least one."""
    return max(1, min(allowed(), int(_cpu_quota(root) or allowed())))


def allowed() -> int:
    """Return the number of processors by affinity; all of the machine on a system without affinity."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_limit(root: Path = _ROOT) -> int | None:
    """Return the memory limit in bytes; None where no limit can be read. v1 writes 2^63 for "unlimited"."""
    for file in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        try:
            return int(file.read_text())
        except (OSError, ValueError):  # absent, or "max"
            continue
    return None


def _cpu_quota(root: Path) -> float | None:
    """Return the CPU quota in processors; None where no limit can be read."""
    try:
        if (root / "cpu.max").is_file():  # v2: "200000 100000", or "max 100000"
            quota, period = (root / "cpu.max").read_text().split()
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
