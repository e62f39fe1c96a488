"""How many processors this process may use: by its affinity, and by the quota of its container.

OpenMP knows the first only. With a thread for each of a host's 64 cores, a container that may use two of them stands
still most of the time.
"""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


def cores(cgroup: Path = _CGROUP) -> int:
    """Whole processors by both, one at least."""
    return max(1, min(allowed(), int(_quota(cgroup) or allowed())))


def allowed() -> int:
    """Processors by affinity; all where the system knows none."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(cgroup: Path) -> float | None:
    """Processors' worth of time that the container has; None where nothing limits it."""
    try:
        if (cgroup / "cpu.max").is_file():  # cgroup v2: "200000 100000", or "max 100000"
            quota, period = (cgroup / "cpu.max").read_text().split()
        else:
            quota, period = ((cgroup / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return int(quota) / int(period) if int(quota) > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None
