"""The promises of the Dockerfile and the compose files, as far as they can be tested without a Docker engine.

The real docker-compose (1.28, 1.29 or 2) reads the compose files where it is installed.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from config import Settings
from tests.conftest import MAX_WAIT, ROOT

FILES = ["docker-compose.yml", "docker-compose.cpu.yml"]
COMPOSE = shutil.which("docker-compose")
NO_COMPOSE = "docker-compose is not installed (Debian: apt-get install docker-compose)"

# A file of an earlier version, with comments after values and blanks that mean "the default".
LEGACY_ENV = """
# service
HOST=0.0.0.0
PORT=7007  # also the published port
WORKERS=1
WORKER_CLASS=uvicorn.workers.UvicornWorker
WORKER_CONNECTIONS=1000
TIMEOUT=120
KEEP_ALIVE=5

# model
MODEL_NAME_OR_PATH=./models/Qwen3-Reranker-4B
MODEL_DEVICE=cuda  # cuda, cpu or auto
MODEL_PRECISION=float16
MAX_MEMORY_PERCENTAGE=90
BATCH_SIZE=
MAX_SEQ_LENGTH=8192

ACCESS_TOKEN=secret-one,secret-two
TOKENIZERS_PARALLELISM=false
PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
LOG_LEVEL=INFO
LOG_FORMAT=%(asctime)s - %(name)s - %(levelname)s - %(message)s
"""


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) of the Dockerfile, continuation lines joined and comments left out."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines(True) if not line.lstrip().startswith("#")]
    joined = "".join(lines).replace("\\\n", "")
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def every(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def health_check() -> list[str]:
    """The command of HEALTHCHECK, in exec form: no shell, so nothing is expanded into the arguments."""
    (check,) = every("HEALTHCHECK")
    command: list[str] = json.loads(check[check.index("[") :])
    return command


def service(file: str) -> dict[str, Any]:
    only = yaml.safe_load((ROOT / file).read_text())["services"]["reranker"]
    assert isinstance(only, dict)
    return only


def seconds(duration: str) -> int:
    parts = re.fullmatch(r"(?:(\d+)m)?(?:(\d+)s)?", duration)
    assert parts is not None
    return 60 * int(parts[1] or 0) + int(parts[2] or 0)


# The Dockerfile


def test_the_image_runs_as_a_user_without_rights() -> None:
    (user,) = every("USER")
    assert user == "10001:10001"
    assert [name for name, _ in instructions()].index("USER") > max(
        i for i, (name, _) in enumerate(instructions()) if name in ("RUN", "COPY")
    ), "nothing of the image belongs to the user who runs it"
    assert not any("--chown" in copy for copy in every("COPY"))


def test_build_arguments() -> None:
    assert every("ARG") == ["BASE_IMAGE=python:3.11-slim-bookworm", 'TORCH_INDEX=""']
    assert instructions()[1] == ("FROM", "${BASE_IMAGE}")


@pytest.mark.parametrize(
    ("index", "compiler"),
    [
        ("", True),
        ("https://download.pytorch.org/whl/cu126", True),
        ("https://mirror.example.org/pytorch-wheels/cu126/", True),
        ("https://download.pytorch.org/whl/cpu", False),
        ("https://download.pytorch.org/whl/cpu/", False),
    ],
)
def test_an_image_with_cuda_has_the_compiler_for_its_layers(index: str, compiler: bool, tmp_path: Path) -> None:
    """The shell of the RUN line itself, with an apt-get and an rm that only write what they are called with."""
    (run,) = [line for line in every("RUN") if "gcc" in line]
    for name in ("apt-get", "rm"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >> {tmp_path}/called\n')
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": index}
    subprocess.run(["/bin/sh", "-c", run], env=env, check=True)
    called = (tmp_path / "called").read_text().splitlines() if (tmp_path / "called").exists() else []
    install = ["apt-get update", "apt-get install -y --no-install-recommends gcc libc6-dev"]
    assert called[:2] == (install if compiler else [])
    assert all(line.startswith("rm -rf /var/lib/apt/lists/") for line in called[2:])
    assert len(called) == (3 if compiler else 0)


def test_code_is_copied_behind_the_packages() -> None:
    names = [name for name, _ in instructions()]
    installs = [i for i, (_, rest) in enumerate(instructions()) if "pip install" in rest]
    copies = [i for i, name in enumerate(names) if name == "COPY"]
    assert instructions()[copies[0]] == ("COPY", "requirements.txt requirements.lock ./")
    assert copies[0] < min(installs) < max(installs) < copies[1]


def test_torch_is_installed_by_the_pin_that_the_makefile_takes() -> None:
    extract = r"sed -n 's/^\(torch==[^ ]*\).*/\1/p' requirements.txt"
    assert any(extract in run for run in every("RUN"))
    assert extract in (ROOT / "Makefile").read_text().replace("$$", "$")
    pin = subprocess.run(shlex.split(extract), cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.fullmatch(r"torch==[\d.]+\n", pin)


@pytest.mark.parametrize(
    "index", ["", "https://download.pytorch.org/whl/cpu", "https://download.pytorch.org/whl/cu126"]
)
def test_everything_is_installed_by_its_hash_but_torch_of_another_index(index: str, tmp_path: Path) -> None:
    """The shell of both RUN lines, with a pip that copies the file it is given, without comments."""
    pip = 'echo "$@" >> called; for file; do [ ! -f "$file" ] || grep -o "^[a-z][^ ]*" "$file" > installed; done'
    (tmp_path / "pip").write_text(f"#!/bin/sh\n{pip}\n")
    (tmp_path / "pip").chmod(0o755)
    for name in ("requirements.txt", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TORCH_INDEX": index}
    for run in (line for line in every("RUN") if "pip install" in line):
        subprocess.run(
            ["/bin/sh", "-c", run.replace("/tmp/lock", f"{tmp_path}/lock")], env=env, cwd=tmp_path, check=True
        )
    called = (tmp_path / "called").read_text().splitlines()
    locked = re.findall(r"^[a-z]\S*", (ROOT / "requirements.lock").read_text(), re.M)
    cuda = [line for line in locked if line.startswith(("torch=", "triton=", "nvidia-", "cuda-"))]
    assert len(cuda) > 10
    assert (tmp_path / "installed").read_text().split() == [line for line in locked if not index or line not in cuda]
    [torch] = [line for line in cuda if line.startswith("torch=")]
    assert called == [
        *([f"install --no-cache-dir --index-url {index} {torch}"] if index else []),
        f"install --no-cache-dir --no-deps --require-hashes -r {tmp_path}/lock",
        "check",
    ]


def test_the_image_holds_what_the_service_needs_and_no_more() -> None:
    copied = {source.rstrip("/") for copy in every("COPY") for source in copy.split()[:-1]}
    assert copied == {
        *(
            "requirements.txt",
            "requirements.lock",
            "app.py",
            "config.py",
            "gunicorn.conf.py",
            "LICENSE",
            "reranker",
            "models/demo",
        )
    }
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line[0] == "!"} == copied, "what is copied, and nothing else, is sent"
    assert any(fnmatch("reranker/engine/__pycache__", line) for line in lines)


def test_gunicorn_gets_the_signals() -> None:
    assert [json.loads(command) for command in every("CMD")] == [["gunicorn", "-c", "gunicorn.conf.py", "app:app"]]
    assert every("STOPSIGNAL") == ["SIGTERM"]
    assert not every("ENTRYPOINT")


# The compose files


@pytest.mark.parametrize("file", FILES)
def test_compose_promises(file: str) -> None:
    it = service(file)
    assert it["env_file"] == ".env"
    assert it["ports"] == ["${PORT:-6006}:${PORT:-6006}"]
    assert it["environment"]["PORT"] == "${PORT:-6006}"
    assert it["volumes"] == ["./models:/app/models:ro", "cache:/cache"]
    assert it["environment"]["HF_HOME"].startswith("/cache/")
    assert it["restart"] == "unless-stopped"
    assert (it["read_only"], it["tmpfs"]) == (True, "/tmp")
    assert (it["cap_drop"], it["security_opt"]) == (["ALL"], ["no-new-privileges:true"])


@pytest.mark.parametrize("file", FILES)
def test_compose_waits_as_long_as_the_service_takes(file: str) -> None:
    defaults = Settings.model_fields
    it = service(file)
    assert seconds(it["stop_grace_period"]) > defaults["request_timeout"].default + 10, "gunicorn's graceful_timeout"
    assert it["healthcheck"] == {"start_period": "30m"}, "the check itself is the image's"
    assert seconds(it["healthcheck"]["start_period"]) == defaults["load_timeout"].default
    (check,) = every("HEALTHCHECK")
    assert f"--start-period={it['healthcheck']['start_period']}" in check


def test_the_two_files_differ_in_the_gpu_alone() -> None:
    gpu, cpu = (service(file) for file in FILES)
    devices = gpu.pop("deploy")["resources"]["reservations"]["devices"]
    assert devices == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert gpu["build"].pop("args") == {"TORCH_INDEX": "${TORCH_INDEX:-}"}
    assert cpu["build"].pop("args") == {"TORCH_INDEX": "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}"}
    assert cpu["environment"].pop("MODEL_DEVICE") == "cpu"
    assert gpu["environment"].pop("MODEL_DEVICE") == "cuda", "auto would serve on the CPU where the driver is too old"
    assert cpu == gpu


@pytest.mark.skipif(COMPOSE is None, reason=NO_COMPOSE)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("env", ["legacy", ".env.example"])
def test_docker_compose_accepts_them(file: str, env: str, tmp_path: Path) -> None:
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    text = LEGACY_ENV if env == "legacy" else (ROOT / env).read_text()
    (tmp_path / ".env").write_text(text)
    got = config(tmp_path, file)
    it = got["services"]["reranker"]
    port = 7007 if env == "legacy" else 6006
    assert ports(it) == [(port, port)]
    assert it["environment"]["PORT"] == str(port)
    assert it["environment"]["HOST"] == "0.0.0.0"
    assert it["environment"]["MODEL_DEVICE"] == ("cuda" if file == FILES[0] else "cpu")
    assert str(tmp_path / "models") in json.dumps(it["volumes"])
    assert ("deploy" in it) == (file == FILES[0])
    if env == "legacy":
        assert it["environment"]["ACCESS_TOKEN"] == "secret-one,secret-two"
        del it["environment"]
        assert "secret" not in json.dumps(it), "the token is in the environment alone"


@pytest.mark.skipif(COMPOSE is None, reason=NO_COMPOSE)
def test_the_shell_wins_over_env_for_both_ports_and_the_build(tmp_path: Path) -> None:
    shutil.copy(ROOT / FILES[0], tmp_path)
    (tmp_path / ".env").write_text("PORT=6006\n")
    it = config(tmp_path, FILES[0], PORT="6100", TORCH_INDEX="https://example.org/whl")["services"]["reranker"]
    assert ports(it) == [(6100, 6100)]
    assert it["environment"]["PORT"] == "6100"
    assert it["build"]["args"] == {"TORCH_INDEX": "https://example.org/whl"}


def config(folder: Path, file: str, **env: str) -> dict[str, Any]:
    """The output of `docker-compose config` for a file."""
    assert COMPOSE is not None
    done = subprocess.run(
        [COMPOSE, "-f", file, "config"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)} | env,
        capture_output=True,
        text=True,
        timeout=MAX_WAIT,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    got: dict[str, Any] = yaml.safe_load(done.stdout)
    return got


def ports(resolved: dict[str, Any]) -> list[tuple[int, int]]:
    """(published, target), which Compose 1 prints as numbers and Compose 2 partly as text."""
    return [(int(port["published"]), int(port["target"])) for port in resolved["ports"]]


# The health check


class Service(ThreadingHTTPServer):
    """A stand-in for the service: /health returns the chosen status to a request with the token."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.token = ""
        self.status = 200


class _Answer(BaseHTTPRequestHandler):
    server: Service

    def do_GET(self) -> None:
        wanted = f"Bearer {self.server.token}" if self.server.token else None
        right = self.path == "/health" and self.headers.get("Authorization") == wanted
        self.send_response(self.server.status if right else 401)
        self.end_headers()
        self.wfile.write(b'{"status":"..."}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def running() -> Iterator[Service]:
    with Service() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def check(env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run it as Docker does: in the folder of the service, and with nothing else in the environment."""
    program, *arguments = health_check()
    assert program == "python"
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=MAX_WAIT, check=False
    )


@pytest.mark.parametrize(
    ("setting", "token"),
    [
        (None, ""),
        ("", ""),
        ("   ", ""),
        ("secret", "secret"),
        ("secret  # what clients send", "secret"),
        ("  # none", ""),
        ("new#1, old", "new#1"),
        (" , ,second", "second"),
        ('"secret"', "secret"),
        ("'one, two'", "one"),
        ("  'new#1'  # the \"token\"", "new#1"),
        ('say"it', 'say"it'),
        (r'"say\"it"', 'say"it'),
        ("ops=0123456789abcdef==, two", "ops=0123456789abcdef=="),  # the service accepts whole entries
    ],
)
def test_health_check_sends_the_first_token(running: Service, setting: str | None, token: str) -> None:
    running.token = token
    env = {"PORT": str(running.server_port)} | ({} if setting is None else {"ACCESS_TOKEN": setting})
    done = check(env)
    assert (done.returncode, done.stdout, done.stderr) == (0, '200 {"status":"..."}\n', "")


@pytest.mark.parametrize("host", ["", "0.0.0.0", "127.0.0.1", "localhost", "0.0.0.0  # everywhere", "'127.0.0.1'"])
def test_health_check_finds_the_service(running: Service, host: str) -> None:
    assert check({"HOST": host, "PORT": f"{running.server_port}   # the port"}).returncode == 0


def test_health_check_fails_unless_the_answer_is_200(running: Service) -> None:
    running.token = "secret"
    env = {"PORT": str(running.server_port), "ACCESS_TOKEN": "secret"}
    running.status = 503
    assert (check(env).returncode, check(env).stdout) == (1, '503 {"status":"..."}\n')
    running.status = 200
    assert check(env | {"ACCESS_TOKEN": "wrong"}).returncode == 1


@pytest.mark.parametrize(
    "changes", [{"PORT": "1"}, {"PORT": "six"}, {"ACCESS_TOKEN": "sec\nret"}, {"ACCESS_TOKEN": "'sec"}]
)
def test_health_check_fails_in_one_line_without_the_token(running: Service, changes: dict[str, str]) -> None:
    done = check({"PORT": str(running.server_port), "ACCESS_TOKEN": "secret"} | changes)
    assert done.returncode == 1
    assert re.fullmatch(r"no answer: \w+\n", done.stderr)
