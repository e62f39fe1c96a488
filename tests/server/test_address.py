"""Addresses: bound before gunicorn binds them, and named as they are reached. The real gunicorn says it in one line."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from app import load_scorer
from config import Settings
from reranker.server.address import bind_error, curl_target, explain, is_local
from tests.conftest import DEMO, FAKE, Server, Start, free_port
from tests.faults.traffic import until

IPV6 = bind_error("::1", 0) is None
needs_ipv6 = pytest.mark.skipif(not IPV6, reason="this machine has no IPv6")
HOST_AND_PORT = ["HOST=h (there)", "PORT=p (there)"]


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of 127.0.0.1 on which another program listens."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", free_port()))
        other.listen()
        yield other.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "localhost"])
def test_a_free_port_can_be_bound_and_is_free_again(host: str) -> None:
    port = free_port()
    assert bind_error(host, port) is None
    assert bind_error(host, port) is None
    assert bind_error(host, 0) is None


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_taken_port_is_the_port_s_fault(taken: int, host: str) -> None:
    error = bind_error(host, taken)
    assert error is not None
    assert explain(error, host, taken, *HOST_AND_PORT) == (
        f"PORT=p (there) cannot be used: another program listens on {host}:{taken}; "
        "stop it (ss -ltnp) or set another port"
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("999.1.1.1", "does not resolve"),
        ("no-such-host.invalid", "does not resolve"),
        ("*", "does not resolve"),
        (f"{'x' * 70}.invalid", "does not resolve"),
        ("a..b", "does not resolve"),
        ("192.0.2.7", "is no address of this machine"),
        pytest.param("2001:db8::7", "is no address of this machine", marks=needs_ipv6),
        ("fe80::1%nowhere", ""),
    ],
)
def test_a_wrong_host_is_the_host_s_fault(host: str, reason: str) -> None:
    error = bind_error(host, free_port())
    assert error is not None
    line = explain(error, host, 1, *HOST_AND_PORT)
    assert line.startswith("HOST=h (there) cannot be used: ")
    assert reason in line
    assert line.endswith("write 0.0.0.0 for all addresses of this machine, or 127.0.0.1 for this machine alone")


def test_a_port_that_needs_rights_is_the_port_s_fault() -> None:
    line = explain(PermissionError(13, "Permission denied"), "0.0.0.0", 80, *HOST_AND_PORT)
    assert line.startswith("PORT=p (there) cannot be used: ")
    assert "1024 to 65535" in line


@pytest.mark.parametrize("port", [1024, 8080])
def test_a_bind_that_is_not_permitted_at_a_high_port_is_not_said_to_need_rights(port: int) -> None:
    line = explain(PermissionError(13, "Permission denied"), "0.0.0.0", port, *HOST_AND_PORT)
    assert line.startswith("HOST=h (there) cannot be used: Permission denied")
    assert "1024" not in line


@pytest.mark.parametrize("port", [65536, 70000, 1 << 70, -1])
def test_a_number_that_is_no_port_is_the_port_s_fault(port: int) -> None:
    error = bind_error("127.0.0.1", port)
    assert error is not None
    assert explain(error, "127.0.0.1", port, *HOST_AND_PORT) == (
        "PORT=p (there) cannot be used: a port is a number from 0 to 65535"
    )


@pytest.mark.parametrize(
    ("listeners", "local", "target"),
    [
        (["http://127.0.0.1:6006"], True, "http://127.0.0.1:6006"),
        (["http://127.0.0.2:6006"], True, "http://127.0.0.2:6006"),
        (["http://[::1]:6006"], True, "http://[::1]:6006"),
        (["unix:/run/my service"], True, "--unix-socket '/run/my service' http://localhost"),
        (["http://127.0.0.1:6006", "unix:/run/s"], True, "http://127.0.0.1:6006"),
        (["http://0.0.0.0:7000"], False, "http://127.0.0.1:7000"),
        (["https://0.0.0.0:7000"], False, "https://127.0.0.1:7000"),
        (["http://[::]:7000"], False, "http://[::1]:7000"),
        (["http://10.0.0.1:7000"], False, "http://10.0.0.1:7000"),
        (["http://127.0.0.1:6006", "http://10.0.0.1:6006"], False, "http://127.0.0.1:6006"),
        ([], False, "http://127.0.0.1:PORT"),
    ],
)
def test_listeners_are_named_as_a_client_reaches_them(listeners: list[str], local: bool, target: str) -> None:
    assert is_local(listeners) == local
    assert curl_target(listeners) == target


# The real gunicorn


def refused(start: Start, **options: object) -> str:
    """The one line of a service that does not start."""
    server = start(wait=None, **options)
    assert server.process.wait(60) == 1, server.log
    assert "Traceback" not in server.log
    assert "Connection in use" not in server.log, "gunicorn has not tried"
    [line] = [line for line in server.log.splitlines() if line.startswith("error: ")]
    assert server.log.splitlines()[-1] == line
    return line


def test_a_taken_port_is_one_line_with_its_source(start: Start, taken: int) -> None:
    line = refused(start, command=FAKE, PORT=str(taken))
    assert line.startswith(
        f"error: PORT='{taken}' (the environment) cannot be used: another program listens on 127.0.0.1:"
    )
    line = refused(start, command=FAKE, PORT="", env_file=f"# mine\nPORT={taken}\n")
    assert line.startswith(f"error: PORT='{taken}' (.env line 2) cannot be used")


def test_a_wrong_host_is_one_line_with_its_source(start: Start) -> None:
    line = refused(start, command=FAKE, HOST="999.1.1.1")
    assert line.startswith("error: HOST='999.1.1.1' (the environment) cannot be used: it does not resolve")
    line = refused(start, command=FAKE, HOST="", env_file="HOST=192.0.2.7\n")
    assert line.startswith("error: HOST='192.0.2.7' (.env line 1) cannot be used: it is no address of this machine")


def test_an_address_of_the_command_line_is_named_as_such(start: Start, taken: int) -> None:
    line = refused(start, command=[*FAKE, "--bind", f"127.0.0.1:{taken}"])
    assert line.startswith(f"error: --bind '127.0.0.1:{taken}' (the command line) cannot be used: another program")
    line = refused(start, command=[*FAKE, "--pid", "it.pid", "-b", "192.0.2.7:80"])
    assert line.startswith("error: --bind '192.0.2.7:80' (the command line) cannot be used: it is no address")
    line = refused(start, command=[*FAKE, "--bind", "127.0.0.1:70000"])
    assert (
        line == "error: --bind '127.0.0.1:70000' (the command line) cannot be used: a port is a number from 0 to 65535"
    )


def test_a_refused_address_leaves_no_pid_file(start: Start, taken: int) -> None:
    server = start(wait=None, command=[*FAKE, "--pid", "it.pid"], PORT=str(taken))
    assert server.process.wait(60) == 1
    assert not server.log_path.with_name("it.pid").exists()


def listening(server: Server) -> str:
    """What the service listens at, as gunicorn says."""
    until(lambda: "Listening at: " in server.log, "it listens")
    return server.log.partition("Listening at: ")[2].split(" ")[0]


def served(server: Server, url: str) -> None:
    def serves() -> bool:
        assert server.process.poll() is None, server.log
        try:
            return httpx.get(f"{url}/health", trust_env=False, timeout=300).text == '{"status":"ok"}'
        except httpx.TransportError:
            return False

    until(serves, f"{url} serves")


def test_the_bind_of_the_command_line_wins_and_the_log_names_it(start: Start) -> None:
    port = free_port()
    server = start(command=[*FAKE, "-b", f"0.0.0.0:{port}"], wait=None)
    assert listening(server) == f"http://0.0.0.0:{port}"
    served(server, f"http://127.0.0.1:{port}")
    [line] = [line for line in server.log.splitlines() if "ACCESS_TOKEN is not set" in line]
    assert " - WARNING - OPEN TO EVERYBODY: " in line
    assert f"who reaches http://0.0.0.0:{port} can use this service" in line
    assert "openssl rand -hex 32" in line
    assert server.stop() == 0


def test_port_0_takes_a_free_one_and_the_log_names_it(start: Start) -> None:
    server = start(command=FAKE, wait=None, PORT="0")
    url = listening(server)
    assert not url.endswith(":0")
    served(server, url)
    assert f"ACCESS_TOKEN is not set: every program on this machine can use the service at {url}" in server.log
    assert " - WARNING - " not in server.log
    assert server.stop() == 0


@needs_ipv6
def test_ipv6(start: Start) -> None:
    server = start(command=FAKE, wait=None, HOST="::1")
    served(server, f"http://[::1]:{server.port}")
    assert "every program on this machine" in server.log
    with_brackets = refused(start, command=FAKE, HOST="[::1]", PORT=str(server.port))
    assert f"listens on [::1]:{server.port}" in with_brackets
    assert server.stop() == 0


def test_a_unix_socket_that_is_left_over_is_replaced(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
    server = start(command=[*FAKE, "-b", f"unix:{path}"], wait=None)
    transport = httpx.HTTPTransport(uds=str(path))
    with httpx.Client(transport=transport, base_url="http://localhost", timeout=300) as client:
        until(lambda: "Listening at: " in server.log and client.get("/health").status_code == 200, "it serves")
    assert f"every program on this machine can use the service at unix:{path}" in server.log
    assert server.stop() == 0


def test_a_socket_of_systemd_is_used_although_the_port_is_taken_by_it(start: Start) -> None:
    """The service is handed file descriptor 3, and the address of its settings is in use: by that very socket."""
    launch = (
        "import os, socket, sys; s = socket.create_server(('127.0.0.1', int(sys.argv[1]))); os.dup2(s.fileno(), 3); "
        "os.set_inheritable(3, True); "
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=str(os.getpid())); os.execv(sys.argv[2], sys.argv[2:])"
    )
    server = start(command=[sys.executable, "-c", launch, "{port}", *FAKE], wait=None)
    served(server, f"http://127.0.0.1:{server.port}")
    assert server.stop() == 0


def test_a_restart_right_after_a_stop_finds_its_port_free(start: Start) -> None:
    """Connections that were closed by the service stay with the system for a minute: SO_REUSEADDR."""
    first = start(command=FAKE)
    assert first.client.post("/v1/rerank", json={"query": "q", "documents": ["d"]}).status_code == 200
    assert first.stop(signal.SIGINT) == 0  # it closes the client's connection, sooner than with SIGTERM
    second = start(command=FAKE, PORT=str(first.port), wait=None)
    served(second, f"http://127.0.0.1:{first.port}")
    assert second.stop() == 0


# A service that would be open although a token was meant


@pytest.mark.parametrize(
    "line",
    [
        'ACCESS_TOKEN="s3cret\n',
        "ACCESS_TOKEN: s3cret\n",
        "ACCESS_TOKEN\n",
        "ACCES_TOKEN=s3cret\n",
        "ACCESS_TOKEN=s3cret\nACCESS_TOKEN=\n",
        "ACCESS_TOKEN=${s3cret}\n",
    ],
)
def test_a_token_that_is_meant_but_mistyped_never_opens_the_service(start: Start, line: str) -> None:
    said = refused(start, command=FAKE, env_file=f"WORKERS=1\n{line}")
    assert "ACCESS_TOKEN" in said
    assert ".env" in said
    assert "s3cret" not in said.replace("${s3cret}", "")


@pytest.mark.parametrize("place", ["file", "environment"])
def test_a_quoted_token_is_the_token(start: Start, place: str) -> None:
    """In the worker as well, which reads what the master exported."""
    value = "'s3cret\"quoted\"'  # old, new"
    given = {"env_file": f"ACCESS_TOKEN={value}\n"} if place == "file" else {"ACCESS_TOKEN": value}
    server = start(command=FAKE, token='s3cret"quoted"', **given)
    assert server.client.get("/health", headers={"Authorization": "Bearer x"}).status_code == 401
    assert "OPEN TO EVERYBODY" not in server.log
    server.client.close()
    assert server.stop() == 0


def test_a_file_in_another_encoding_is_one_line(start: Start) -> None:
    folder = start(command=[sys.executable, "-c", ""], wait=None).log_path.parent
    (folder / ".env").write_bytes("# 端口\nPORT=7001\n".encode("gbk"))
    done = subprocess.run(
        FAKE,
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(Path.cwd())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert line.startswith("error: .env is not UTF-8 (line 1; it looks like GB18030): save it as UTF-8")


# uvicorn alone, whose address the application does not know


def test_uvicorn_s_port_is_not_taken_for_another(start: Start) -> None:
    uvicorn = str(Path(sys.executable).with_name("uvicorn"))
    server = start(command=[uvicorn, *FAKE[-1:], "--host", "127.0.0.1", "--port", "{port}"], PORT="")
    assert "6006" not in server.log
    assert "who reaches its port can use this service" in server.log
    assert server.stop() in (0, -signal.SIGTERM)


def test_an_unknown_port_is_a_placeholder_in_the_hint(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="reranker"):
        load_scorer(Settings(model_name_or_path=str(DEMO), model_device="cpu", max_batch_tokens=1024))
    assert "try it: curl http://127.0.0.1:PORT/v1/rerank" in caplog.text
