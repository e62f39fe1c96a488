"""Servers that benchmarks start and measure from outside: processor seconds and memory of all their processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.models import CACHE
from benchmarks.peers import CHAT_TEMPLATE

ROOT = Path(__file__).resolve().parents[1]
MODEL = "qwen3-reranker"


@dataclass
class Running:
    """A server under measurement."""

    name: str
    url: str
    """Of its rerank route."""
    process: subprocess.Popen[bytes] | None = None
    """None: started by somebody else, so only its answers can be measured."""
    ready_after: float = 0.0
    """Seconds from its start to the first answer."""

    def processor_seconds(self) -> float:
        """Of all its processes since their start."""
        return sum(sum(p.cpu_times()[:2]) for p in self._family())

    def memory(self) -> int:
        """Resident bytes of all its processes."""
        return sum(p.memory_info().rss for p in self._family())

    def pause(self, paused: bool) -> None:
        """Stop all its processes where they are, or let them go on: one that waits may take processor time too."""
        for process in self._family():
            process.send_signal(signal.SIGSTOP if paused else signal.SIGCONT)

    def stop(self) -> None:
        """Ask it to end, and wait."""
        if self.process is None:
            return
        self.pause(False)
        family = self._family()
        self.process.send_signal(signal.SIGTERM)
        psutil.wait_procs(family, timeout=30)
        for process in family:
            if process.is_running():
                process.kill()
        self.process.wait()

    def _family(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def ours(model: Path, threads: int, **settings: str) -> Running:
    """This service under gunicorn, as `make serve` starts it."""
    port = free_port()
    command = [str(Path(sys.executable).with_name("gunicorn")), "-c", "gunicorn.conf.py", "app:app"]
    env = {"PORT": str(port), "HOST": "127.0.0.1", "MODEL_NAME_OR_PATH": str(model), "OMP_NUM_THREADS": str(threads)}
    env |= {"LOG_LEVEL": "WARNING", "MODEL_DEVICE": "cpu", "MODEL_PRECISION": "float32", **settings}
    env |= {"TIMEOUT": "3600"}  # it is stopped while others have their turn, and would be replaced behind it
    return _start("this service", f"http://127.0.0.1:{port}/v1/rerank", command, env)


def vllm(binary: Path, model: Path, threads: int, block: int = 32) -> Running:
    """vLLM with the overrides and the template without which it gives this model's scores wrong.

    Blocks of 32: with its default of 128 the shared prefix is shorter than a block, and nothing is shared.
    """
    port = free_port()
    template = model / "qwen3_reranker.jinja"
    template.write_text(CHAT_TEMPLATE)
    overrides = {
        "architectures": ["Qwen3ForSequenceClassification"],
        "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True,
    }
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "served-model-name": MODEL,
        "runner": "pooling",
        "dtype": "float32",
        "max-model-len": "8192",
        "block-size": str(block),
        "hf-overrides": json.dumps(overrides),
        "chat-template": str(template),
    }
    command = [str(binary), "serve", str(model), "--enable-prefix-caching"]
    for name, value in options.items():
        command += [f"--{name}", value]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}  # by default its front end keeps one core for itself: half of two
    env |= {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(threads)}
    return _start(f"vLLM, block {block}", f"http://127.0.0.1:{port}/v1/rerank", command, env)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _start(name: str, url: str, command: list[str], env: dict[str, str]) -> Running:
    kept = {n: v for n, v in os.environ.items() if n in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR")}
    begin = time.monotonic()
    CACHE.mkdir(exist_ok=True)
    log = CACHE / f"{Path(command[0]).name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, cwd=ROOT, env=kept | env, stdout=out, stderr=out)
    body = {"model": MODEL, "query": "warm-up", "documents": ["a document"] * 8}
    while time.monotonic() < begin + 600:
        if process.poll() is not None:
            raise RuntimeError(f"{name} ended with {process.returncode} before it answered: see {log}")
        try:
            if httpx.post(url, json=body, timeout=120, trust_env=False).status_code == 200:
                return Running(name, url, process, time.monotonic() - begin)
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    Running(name, url, process).stop()
    raise RuntimeError(f"{name} did not answer within ten minutes: see {log}")
