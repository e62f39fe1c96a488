"""Models, servers and clients that the tests share. Servers bind to 127.0.0.1 and stop with their module or session."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from benchmarks.card import Card

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "models" / "demo"

MAX_WAIT = 300.0
"""Seconds until a condition or a response counts as missing: a hang, not a busy machine, exceeds it."""

# The models are tiny: a second thread costs more time than it saves.
torch.set_num_threads(1)
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
os.environ |= ONE_THREAD


def make_model(
    folder: Path, *, layers: int = 3, tied: bool = True, std: float = 0.05, shards: bool = False, **changes: Any
) -> Path:
    """Write a random-weight Qwen3ForCausalLM with the demo's tokenizer; a larger `std` spreads the logits further."""
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
            # Norm weights differ from 1, so that an ignored norm weight changes the logits.
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
    """The demo's tokenizer and Qwen3's own; `make tokenizer` builds the latter."""
    if not request.param.is_dir():
        pytest.skip("Qwen3's tokenizer is missing: run `make tokenizer`")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(request.param))
    return tokenizer


def free_port() -> int:
    """Return a free port below the ephemeral range, so that no client connection takes it before the server binds it.

    Each xdist process draws from its own residue class, so two processes never draw the same port.
    """
    runner = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8
    while True:
        port = random.randrange(20_000 + runner, 32_000, 8)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


@dataclass
class Server:
    """A real gunicorn (or uvicorn) process with its log and an HTTP client."""

    process: subprocess.Popen[bytes]
    port: int
    log_path: Path
    client: httpx.Client

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def wait_for(self, status: str, seconds: float = MAX_WAIT) -> None:
        """Wait until /health reports `status`; fail with the log when the process exits or the time is over."""
        deadline = time.monotonic() + seconds
        seen = "nothing"
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server exited with {self.process.returncode}:\n{self.log}"
            try:
                seen = self.client.get("/health").json().get("status")
            except (httpx.TransportError, ValueError):
                seen = "no response"
            if seen == status:
                return
            time.sleep(0.02)
        raise AssertionError(f"/health reports {seen!r}, not {status!r}, after {seconds} s:\n{self.log}")

    def stop(self, sig: int = signal.SIGTERM, seconds: float = MAX_WAIT) -> int:
        """Send a signal to the process and return its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(sig)
        return self.process.wait(seconds)


Start = Callable[..., Server]
GUNICORN = [str(Path(sys.executable).with_name("gunicorn")), "-c", str(ROOT / "gunicorn.conf.py"), "app:app"]
FAKE = [*GUNICORN[:-1], "tests.fake_app:app"]


@contextmanager
def starting(folders: pytest.TempPathFactory) -> Iterator[Start]:
    """Yield a function that starts servers, and stop all of them at the end."""
    servers: list[Server] = []

    def start(
        *, env_file: str = "", command: list[str] | None = None, wait: str | None = "ok", token: str = "", **env: str
    ) -> Server:
        folder = folders.mktemp("server")
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
        # verify=False: the certificates take 25 ms to load, and these servers speak plain HTTP.
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=MAX_WAIT, trust_env=False, verify=False
        )
        server = Server(process, port, log_path, client)
        servers.append(server)
        if wait:
            server.wait_for(wait)
        return server

    yield start
    for server in servers:  # all are signalled before the first wait: a stop takes about a second of idle time
        server.client.close()
        if server.process.poll() is None:
            server.process.terminate()
    for server in servers:
        try:
            server.process.wait(60)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start a server for one module: `start(ACCESS_TOKEN="x", env_file=..., command=..., wait="ok")`."""
    with starting(tmp_path_factory) as start:
        yield start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The service as `make serve` runs it, with the demo model and without a token."""
    with starting(tmp_path_factory) as start:
        yield start()


@pytest.fixture(scope="session")
def fake_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The real service around tests/fake.py: a document's logit is the number of words it shares with the query."""
    with starting(tmp_path_factory) as start:
        yield start(command=FAKE)


@pytest.fixture(scope="session")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The demo model with a context of 160 tokens, so that texts are truncated, and a cache that stores truncations."""
    with starting(tmp_path_factory) as start:
        yield start(MAX_SEQ_LENGTH="160", MODEL_DEVICE="cpu", SCORE_CACHE_ENTRIES="100")
