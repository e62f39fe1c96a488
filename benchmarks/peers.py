"""The contestants of `benchmarks.engine`, each in a process and, where it needs one, in an environment of its own.

vLLM and sentence-transformers need a chat template that writes the card's prompt, and jinja strips one of its last
newlines. Peers that serve HTTP are in `benchmarks.serving`.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.card import INSTRUCTION, PREFIX, SUFFIX
from benchmarks.encoder_models import ENCODERS
from benchmarks.launch import ROOT
from benchmarks.models import CACHE, classifier
from benchmarks.openmp import OWN, environment
from benchmarks.workloads import Requests

OURS = "this engine"
WORKER = Path(__file__).with_name("worker.py")


def _role(name: str, default: str = "") -> str:
    found = f'messages | selectattr("role", "eq", "{name}") | map(attribute="content") | first'
    return "{{ " + found + (f' | default("{default}")' if default else "") + " }}"


CHAT_TEMPLATE = (
    f"{PREFIX}<Instruct>: {_role('system', INSTRUCTION)}\n<Query>: {_role('query')}\n"
    f"<Document>: {_role('document')}{SUFFIX}\n"
)
PAIR = f"{PREFIX}<Instruct>: {INSTRUCTION}\n<Query>: {{query}}\n<Document>: {{document}}{SUFFIX}"

Options = Callable[[str, Path, int], dict[str, Any]]
"""Shape, checkpoint and threads -> the options of a worker that are a contestant's own."""


def _batch(batch: int, **more: Any) -> Options:
    return lambda shape, path, threads: {"batch": batch, **more}


def _sentence_transformers(batch: int) -> Options:
    return lambda shape, path, threads: {
        "batch": batch,
        "chat_template": None if shape in ENCODERS else CHAT_TEMPLATE,
    }


def _openvino(batch: int, *, streams: bool = False) -> Options:
    def options(shape: str, path: Path, threads: int) -> dict[str, Any]:
        own = {"pair": None} if shape in ENCODERS else {"pair": PAIR, "path": str(classifier(path))}
        return {"batch": batch, "streams": threads if streams else 1, **own}

    return options


CONTESTANTS: dict[str, tuple[str, Options]] = {
    OURS: ("ours", lambda shape, path, threads: {}),
    "card, 1 pair, last position": ("card", _batch(1)),
    "card, batch 8, last position": ("card", _batch(8)),
    "card, batch 32, last position": ("card", _batch(32)),
    "card as printed, batch 8": ("card", _batch(8, all_positions=True)),
    "sentence-transformers, 1 pair": ("sentence_transformers", _sentence_transformers(1)),
    "sentence-transformers, batch 8": ("sentence_transformers", _sentence_transformers(8)),
    "sentence-transformers, batch 32": ("sentence_transformers", _sentence_transformers(32)),
    "OpenVINO, 1 pair": ("openvino", _openvino(1)),
    "OpenVINO, batch 8": ("openvino", _openvino(8)),
    "OpenVINO, 1 pair, a stream for each core": ("openvino", _openvino(1, streams=True)),
}
"""By name: the worker's kind and its options. Names up to the comma are one peer, in several settings."""


def interpreter(kind: str) -> Path | None:
    """The Python that has the packages of a kind of worker; None where they are not installed."""
    if kind in ("ours", "card") or importlib.util.find_spec(kind):
        return Path(sys.executable)
    folder = {"sentence_transformers": ROOT / ".venv/references"}.get(kind, CACHE / kind)
    python = folder / "bin/python"
    return python if python.exists() else None


def available(shape: str) -> list[str]:
    """The contestants that can be started here for a shape; the others are named on stderr, with their installers."""
    names = [name for name, (kind, _) in CONTESTANTS.items() if kind != "card" or shape not in ENCODERS]
    for kind in dict.fromkeys(CONTESTANTS[name][0] for name in names):
        if not interpreter(kind):
            how = "make test-references" if kind == "sentence_transformers" else f"benchmarks/environments/{kind}.sh"
            print(f"{kind} is not installed, so it is left out; to install it: {how}", file=sys.stderr)
            names = [name for name in names if CONTESTANTS[name][0] != kind]
    return names


@dataclass
class Round:
    """The time and the scores of one contestant for the whole workload."""

    seconds: float
    processor_seconds: float
    scores: list[list[float]]


@dataclass
class Contestant:
    """A process that scores on command."""

    name: str
    process: subprocess.Popen[str]

    def run(self, work: Requests) -> Round:
        """Score a workload; returns when it is done."""
        return Round(**self._ask([[request["query"], request["documents"]] for request in work]))

    def leave(self) -> int:
        """End the process; its peak memory in bytes: resident on a CPU, allocated on a GPU."""
        peak: int = self._ask(None)
        self.process.communicate()
        return peak

    def _ask(self, command: Any) -> Any:
        assert self.process.stdin
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        """The next answer of the process.

        Raises:
            RuntimeError: it ended instead; its errors are on stderr.
        """
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.name} ended with status {self.process.wait()}; its output is above")
        return json.loads(line)


def start(name: str, shape: str, path: Path, device: str, precision: str, threads: int) -> Contestant:
    """A contestant with its model loaded and its first pass behind it.

    Raises:
        RuntimeError: it did not start, or its packages are not installed.
    """
    kind, own = CONTESTANTS[name]
    if not (python := interpreter(kind)):
        raise RuntimeError(f"{name}: its packages are not installed, see benchmarks/environments")
    options = {"path": str(path), "device": device, "precision": precision, "threads": threads}
    command = [str(python), "-P", str(WORKER), kind, json.dumps(options | own(shape, path, threads))]
    variables = {"PYTHONPATH": str(ROOT)} if kind in ("ours", "card") else {}
    waiting = {} if kind == "ours" else OWN | {"OMP_WAIT_POLICY": None}
    with environment(**waiting, **variables, HF_HUB_OFFLINE="1", OMP_NUM_THREADS=str(threads)):
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    contestant = Contestant(name, process)
    contestant.answer()
    return contestant
