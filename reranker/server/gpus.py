"""The GPUs that the workers of a service share out."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

logger = logging.getLogger("gunicorn.error")

_ALL_WORKERS = 90.0
_SECONDS = 300
_ROOT = Path(__file__).parents[2]
_COUNT = "from reranker.engine.driver import usable_gpus; print(*usable_gpus())"


def usable_names() -> list[str]:
    """Return the usable GPUs as CUDA_VISIBLE_DEVICES names them: by index, UUID or MIG name.

    Asked in a separate process, because the master must never hold a GPU. A process sees only the first of several MIG
    devices, so the others are taken as the operator names them.
    """
    try:
        ran = subprocess.run(
            [sys.executable, "-c", _COUNT], cwd=_ROOT, capture_output=True, text=True, timeout=_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        logger.warning("the GPUs were not counted: no answer of the driver within %d s", _SECONDS)
        return []
    if ran.returncode != 0:
        logger.warning("the GPUs were not counted: %s", (ran.stderr.strip().splitlines() or ["no output"])[-1])
        return []
    usable = [int(index) for index in (ran.stdout.strip().splitlines() or [""])[-1].split()]
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if names and names[0].startswith("MIG-"):
        return list(dict.fromkeys(names)) if usable else []
    return [names[index] for index in usable] if names else [str(index) for index in usable]


def memory_share(percentage: float, workers: int) -> float:
    """Return the share of a GPU's memory, in percent, that each of its workers may take.

    `percentage`, which is one process's, or an equal part of 90 percent (of `percentage`, if that is more).
    """
    return min(percentage, max(percentage, _ALL_WORKERS) / workers)
