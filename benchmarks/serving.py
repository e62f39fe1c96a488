"""The servers of `benchmarks.servers`: this service, and peers as their own documentation sets them up for a CPU.

Every server may use all cores asked for; each is installed by the script of its name in benchmarks/environments.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx

from benchmarks.encoder_models import ENCODERS
from benchmarks.launch import Service, free_port, run, serve
from benchmarks.models import CACHE
from benchmarks.openmp import environment
from benchmarks.peers import CHAT_TEMPLATE

MODEL = "qwen3-reranker"
_EXPORT = """
import functools, sys, torch
torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)  # optimum 1.24 knows no other exporter
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-classification")
"""


@dataclass
class Running:
    """A server under measurement."""

    name: str
    url: str
    """Of its rerank route."""
    service: Service | None = None
    """None: started by somebody else, so only its responses can be measured."""

    def processor_seconds(self) -> float:
        """Of all its processes since their start."""
        return self.service.processor_seconds() if self.service else math.nan

    def pause(self, paused: bool) -> None:
        """Stop or continue it."""
        if self.service:
            self.service.pause(paused)

    def rerank(self, http: httpx.Client, query: str, documents: list[str]) -> list[float]:
        """Probabilities in document order; NaN where the response has none.

        Raises:
            httpx.HTTPError: the request failed.
            KeyError: the response has other fields.
        """
        response = http.post(self.url, json={"model": MODEL, "query": query, "documents": documents})
        response.raise_for_status()
        scores = [math.nan] * len(documents)
        for row in response.json()["results"]:
            scores[row["index"]] = row["relevance_score"]
        return scores


@contextmanager
def ours(shape: str, path: Path, threads: int, precision: str) -> Iterator[Running]:
    """This service under gunicorn, as `make serve` starts it."""
    settings: dict[str, object] = {"MODEL_NAME_OR_PATH": path, "OMP_NUM_THREADS": threads, "LOG_LEVEL": "WARNING"}
    settings |= {"MODEL_DEVICE": "cpu", "MODEL_PRECISION": precision, "REQUEST_TIMEOUT": 600}
    settings |= {"TIMEOUT": 3600}  # the master would replace a worker that is stopped for a peer's turn
    with serve("app:app", **settings) as service:
        yield Running("this service", f"http://127.0.0.1:{service.port}/v1/rerank", service)


@contextmanager
def vllm(shape: str, path: Path, threads: int, precision: str) -> Iterator[Running]:
    """vLLM with the overrides and the template without which its scores of this model are wrong.

    Blocks of 32: the shared prefix is shorter than vLLM's default block of 128, which would share nothing.
    """
    folder, port = CACHE / "vllm", free_port()
    template = path / "qwen3_reranker.jinja"
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
        "dtype": precision,
        "max-model-len": "8192",
        "block-size": "32",
        "hf-overrides": json.dumps(overrides),
        "chat-template": str(template),
    }
    command = [str(folder / "bin/vllm"), "serve", str(path), "--enable-prefix-caching"]
    for name, value in options.items():
        command += [f"--{name}", value]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}  # the default reserves one core for the front end: half of two
    env |= {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_LOGGING_LEVEL": "WARNING"}
    preloaded = [folder / "lib" / name for name in ("libtcmalloc_minimal.so.4", "libiomp5.so")]
    env |= {"LD_PRELOAD": ":".join(str(file) for file in preloaded if file.exists())}  # as its documentation says
    server = Running("vLLM", f"http://127.0.0.1:{port}/v1/rerank")
    with _peer(command, port, env, server):
        yield server


@contextmanager
def infinity(
    shape: str, path: Path, threads: int, precision: str, engine: str = "torch", batch: int = 32
) -> Iterator[Running]:
    """Infinity, whose batches are sorted by length, with one of its engines for a CPU and by default its own batch."""
    port = free_port()
    options = {"host": "127.0.0.1", "port": str(port), "served-model-name": MODEL, "model-id": str(path)}
    options |= {"engine": engine, "device": "cpu", "dtype": precision, "batch-size": str(batch)}
    command = [str(CACHE / "infinity/bin/infinity_emb"), "v2", "--no-model-warmup"]
    for name, value in options.items():
        command += [f"--{name}", value]
    env = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": str(threads)}
    server = Running(f"Infinity, {engine}, batch {batch}", f"http://127.0.0.1:{port}/rerank")
    with _peer(command, port, env, server):
        yield server


@contextmanager
def infinity_onnx(shape: str, path: Path, threads: int, precision: str) -> Iterator[Running]:
    """Infinity with ONNX Runtime, which its author recommends for CPUs; the model is exported on the first start."""
    folder = path / "onnx"
    if not (folder / "model.onnx").exists():
        partial = folder.with_name("onnx.partial")
        command = [str(CACHE / "infinity/bin/python"), "-c", _EXPORT, str(path), str(partial)]
        subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        partial.rename(folder)
    with infinity(shape, folder, threads, precision, "optimum") as server:
        yield server


@contextmanager
def _peer(command: list[str], port: int, env: dict[str, str], server: Running) -> Iterator[None]:
    def ready() -> bool:
        try:
            with httpx.Client(timeout=120, trust_env=False) as client:
                server.rerank(client, "warm-up", ["a document"] * 8)
        except httpx.HTTPError:
            return False
        return True

    # This process's threads sleep while they wait (benchmarks/openmp.py); a peer decides for itself, vLLM also how many
    # threads each of its processes has.
    with (
        environment(OMP_WAIT_POLICY=None, OMP_NUM_THREADS=None),
        run(command, port, env, ready, seconds=600) as server.service,
    ):
        yield


Server = Callable[[str, Path, int, str], AbstractContextManager[Running]]
"""Shape, checkpoint, threads, precision -> the running server."""

PEERS: dict[str, Server] = {
    "vllm": vllm,
    "infinity": infinity,
    "infinity-8": partial(infinity, batch=8),
    "infinity-onnx": infinity_onnx,
}


def installed(shape: str) -> list[str]:
    """The peers that serve a shape and are installed here."""
    serves = {"infinity": shape in ENCODERS, "vllm": shape not in ENCODERS}
    environments = {name: name.partition("-")[0] for name in PEERS}
    return [name for name, of in environments.items() if serves[of] and (CACHE / of / "bin/python").exists()]
