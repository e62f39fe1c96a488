"""A worker's limit on connections, its advice to clients after its scorer is lost, its end, and TLS."""

from __future__ import annotations

import asyncio
import resource
import shutil
import socket
import ssl
import subprocess
from functools import partial
from pathlib import Path

import httpx
import pytest
from uvicorn.config import Config

from app import create_app
from config import Settings
from reranker.errors import ModelLoadError, NotReadyError
from reranker.http.state import service_of
from reranker.scheduler.compute import ScorerLike
from reranker.server.protocol import ConnectionPool, HttpProtocol
from reranker.server.siblings import Siblings
from reranker.server.worker import DrainingServer, raise_fd_limit
from tests.conftest import FAKE, Start
from tests.fake import FakeScorer
from tests.faults.traffic import BODY, all_ready

ENDLESS = resource.RLIM_INFINITY


@pytest.mark.parametrize(
    ("soft", "hard", "taken", "raised"),
    [
        (1024, 524_288, 3000, 3256),  # as a shell and systemd have it
        (1024, ENDLESS, 3000, 3256),
        (1_048_576, 1_048_576, 3000, None),  # a container
        (ENDLESS, ENDLESS, 3000, None),
        (1024, 2048, 1792, 2048),
        (1024, 1024, 768, None),
        (100, 100, 1, None),
    ],
)
def test_room_for_connections(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, taken: int, raised: int | None
) -> None:
    limits: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, new: limits.append(new))
    assert raise_fd_limit(3000) == taken
    assert limits == ([] if raised is None else [(raised, hard)])


@pytest.mark.parametrize(("workers", "seconds"), [(1, 30), (2, 1)])
def test_clients_of_an_unhealthy_worker_retry_soon_where_a_sibling_serves(workers: int, seconds: int) -> None:
    def load() -> ScorerLike:
        raise ModelLoadError("no model")

    async def main() -> None:
        app = create_app(Settings(), load, on_failure=lambda error: None)
        async with app.router.lifespan_context(app):
            await service_of(app).batcher.wait_until_loaded()
            server = DrainingServer(Config(app), service_of(app), None, workers=workers)
            server.servers, server.started = [], True
            server.step_aside_if_unhealthy()
            with pytest.raises(NotReadyError, match=f"try again in {seconds} s") as refusal:
                service_of(app).batcher.require_ready()
            assert refusal.value.retry_after == seconds

    asyncio.run(main())


def test_every_response_after_the_port_is_closed_tells_that_the_connection_closes(tmp_path: Path) -> None:
    """Also while the worker still accepts connections of its siblings, before it drains its own."""

    async def main() -> None:
        async def get() -> bytes:
            writer.write(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")
            return await reader.readuntil(b"\r\n\r\n")  # a head, after the body of the response before it

        class Leaving(Siblings):
            async def leave(self) -> None:
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection(*address)
                responses.append(await get())
                await super().leave()

        responses: list[bytes] = []
        app = create_app(Settings(), FakeScorer)
        service, siblings = service_of(app), Leaving(str(tmp_path), 0)
        config = Config(app, ws="none", log_config=None)
        config.http = partial(  # type: ignore[assignment]  # as the worker does
            HttpProtocol,
            pool=ConnectionPool(9),
            metrics=service.metrics,
            address=service.client_address,
            io_timeout=20.0,
            siblings=siblings,
        )
        server = DrainingServer(config, service, siblings, workers=2)
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        reader, writer = await asyncio.open_connection(*address)
        responses.append(await get())
        server.should_exit = True  # as SIGTERM does
        await serving
        writer.close()
        asyncio.get_running_loop().remove_reader(siblings._socket)
        siblings._socket.close()  # the end of the process closes a worker's
        assert [b"connection: close" in response for response in responses] == [False, True]

    asyncio.run(main())


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_workers_with_tls_serve_the_requests_that_they_receive(start: Start, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    make += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(make, check=True, capture_output=True)
    tls = ["--certfile", str(certificate), "--keyfile", str(key)]
    server = start(command=[*FAKE, *tls], WORKERS="2", wait=None)
    all_ready(server, 2)
    verify = ssl.create_default_context(cafile=str(certificate))
    for _ in range(4):
        with httpx.Client(verify=verify, trust_env=False, timeout=60) as client:
            for _ in range(2):
                assert client.post(f"https://127.0.0.1:{server.port}/v1/rerank", json=BODY).status_code == 200
    assert server.stop() == 0
