"""Models, servers and clients that the tests share. Everything listens on 127.0.0.1 and ends with the test session."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from tests.engine.card import Card

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo"

# Tiny models: a second thread costs more than it brings, most of all on a busy machine.
torch.set_num_threads(1)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
os.environ |= ONE_THREAD


def make_model(
    folder: Path, *, layers: int = 3, tied: bool = True, std: float = 0.05, shards: bool = False, **changes: Any
) -> Path:
    """A random-weight Qwen3ForCausalLM beside the demo's tokenizer; `std` spreads the logits so that errors show."""
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.md"))
    size = Qwen3Config.from_pretrained(str(DEMO)).vocab_size
    shape: dict[str, Any] = {
        "vocab_size": size,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": layers,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 40960,
        "rope_theta": 1_000_000,
        "tie_word_embeddings": tied,
    }
    torch.manual_seed(7)
    model = Qwen3ForCausalLM(Qwen3Config(**(shape | changes)))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            # Norms differ from one as well, so that a forgotten norm weight shows.
            weight.normal_(1.0, 0.1) if "norm" in name else weight.normal_(0, std * 4)
    model.tie_weights()
    model.save_pretrained(str(folder), max_shard_size="300KB" if shards else "5GB")
    return folder


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def card(model_path: Path) -> Card:
    return Card(model_path)


@pytest.fixture(scope="session", params=[DEMO, ROOT / "benchmarks" / ".cache" / "tokenizer"], ids=["demo", "qwen3"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerBase:
    """The demo's tokenizer, and Qwen3's own, which `make tokenizer` builds from a package of the index."""
    if not request.param.is_dir():
        pytest.skip("Qwen3's tokenizer is not there: run `make tokenizer`")
    made: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(request.param))
    return made


def free_port() -> int:
    """Below those that the system hands out itself, so that nobody gets it before a server that starts slowly.

    Processes of one test run take turns at the numbers, for the same reason.
    """
    runner = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    while True:
        port = random.randrange(20_000 + runner, 32_000, 8)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


@dataclass
class Server:
    """A real gunicorn (or uvicorn) with its log and a client."""

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path
    client: httpx.Client

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_for(self, status: str, seconds: float = 90) -> None:
        """Until /health says so; an exited process or the deadline fails the test with the log."""
        deadline = time.monotonic() + seconds
        seen = "nothing"
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{self.log}"
            try:
                seen = self.client.get("/health").json().get("status")
            except (httpx.TransportError, ValueError):
                seen = "no answer"
            if seen == status:
                return
            time.sleep(0.05)
        raise AssertionError(f"/health says {seen!r}, not {status!r}, after {seconds} s:\n{self.log}")

    def stop(self, sig: int = signal.SIGTERM, seconds: float = 30) -> int:
        """Signal the process by its id and wait for its end."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(seconds)


Start = Callable[..., Server]
GUNICORN = [str(Path(sys.executable).with_name("gunicorn")), "-c", str(ROOT / "gunicorn.conf.py"), "app:app"]
FAKE = [*GUNICORN[:-1], "tests.fake_app:app"]


@pytest.fixture(scope="session")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a server: `start(ACCESS_TOKEN="x", env_file=..., command=..., wait="ok")`."""
    servers: list[Server] = []

    def run(
        *, env_file: str = "", command: list[str] | None = None, wait: str | None = "ok", token: str = "", **env: str
    ) -> Server:
        folder = tmp_path_factory.mktemp("server")
        port = free_port()
        (folder / ".env").write_text(env_file)
        inherited = {n: v for n, v in os.environ.items() if n in ("PATH", "HOME", "LANG", "LD_LIBRARY_PATH", "TMPDIR")}
        log_path = folder / "log"
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [part.format(port=port) for part in command or GUNICORN],
                cwd=folder,
                env=inherited | ONE_THREAD | {"PYTHONPATH": str(ROOT), "PORT": str(port), "HOST": "127.0.0.1"} | env,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = httpx.Client(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=60, trust_env=False)
        server = Server(process, port, log_path, client)
        servers.append(server)
        if wait:
            server.wait_for(wait)
        return server

    yield run
    for server in servers:
        server.client.close()
        if server.process.poll() is None:
            try:
                server.stop()
            except subprocess.TimeoutExpired:
                server.process.kill()
                server.process.wait()


@pytest.fixture(scope="session")
def server(start: Start) -> Server:
    """The service as `make serve` runs it, with the demo model and without a token."""
    return start()


@pytest.fixture(scope="session")
def fake_server(start: Start) -> Server:
    """The real service around tests/fake.py: a document's logit is the number of words it shares with the query."""
    return start(command=FAKE)
