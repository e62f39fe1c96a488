"""The head of every result (machine, versions, command, commit) and its tables."""

from __future__ import annotations

import contextlib
import math
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
import transformers

FEWER = 0.85
"""Below this share of its cores a contestant is marked."""


def header() -> str:
    """Markdown lines with the command, the commit, the machine and the versions."""
    commit = ""
    with contextlib.suppress(OSError):  # no git, on a machine that was given a checkout
        asked = ["git", "rev-parse", "--short", "HEAD"]
        run = subprocess.run(asked, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        commit = run.stdout.strip()
    device = f"{_processor()}, {torch.get_num_threads()} thread(s)"
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    now = datetime.now(UTC).strftime("%Y-%m-%d")
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    script = Path(sys.argv[0])
    command = f"python -m {script.parent.name}.{script.stem} {shlex.join(sys.argv[1:])}".strip()
    return f"`{command}` · {now} · commit {commit or 'unknown'}\n\n{device}; {versions}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def fewer_cores(used: float, allowed: int) -> str:
    """Cores used, marked where a contestant leaves a part of those that it may use: a setting may be wrong."""
    return f"{used:.2f} of {allowed}: FEWER" if used < FEWER * allowed else f"{used:.2f}"


def write_section(file: Path, text: str) -> None:
    """Write a section into a Markdown file, in place of the one with the same heading, or at the end.

    Args:
        file: with sections that begin with `## `.
        text: begins with the heading.
    """
    heading = text.partition("\n")[0]
    before, found, old = file.read_text(encoding="utf-8").partition(f"{heading}\n")
    after = old.partition("\n## ") if found else ("", "", "")
    rest = f"\n{after[1].lstrip()}{after[2]}" if after[1] else ""
    file.write_text(f"{before.rstrip()}\n\n{text.strip()}\n{rest}", encoding="utf-8")


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that `percent` percent of the values do not exceed; NaN without values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)] if ordered else math.nan


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    wide = next((f for f in ("amx_tile", "avx512f", "avx2") if f in text), "no AVX2")
    return f"{len(names)} cores {names[0] if names else platform.machine()} ({wide})"
