"""The values at /metrics of a real gunicorn with one and with several workers, read by Prometheus's own parsers."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fastapi.routing import iter_route_contexts
from prometheus_client import values
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from app import create_app
from config import Settings
from reranker import errors
from reranker.engine.scorer import Scorer
from reranker.http.access import AccessLog
from reranker.http.callers import MAX_NAMES, NONE, UNNAMED
from reranker.http.metric_files import SIZES
from reranker.http.metrics import OTHER, TABLE, Metrics
from reranker.http.state import context_of, service_of
from reranker.scheduler.batcher import Batcher
from reranker.types import RerankRequest
from tests.conftest import GUNICORN, ROOT, Server, Start
from tests.fake import PREFIX, FakeScorer
from tests.faults.traffic import until
from tests.test_imports import imports, top

FAKE = [*GUNICORN[:-1], "tests.fake_app:app"]
UVICORN = [str(Path(sys.executable).with_name("uvicorn")), "tests.fake_app:app", "--port", "{port}"]
TOKEN = "tok-en"
LABELS = {
    "model": "fake",
    "device": "cpu",
    "precision": "float32",
    "version": "0.1.0",
    "family": "Qwen3",
    "score": "logit(yes) - logit(no)",
}
"""Of reranker_model_info."""
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(server: Server) -> Samples:
    """Return every sample by name and labels, from the text format."""
    answer = server.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found = [s for family in parse_text(answer.text) for s in family.samples]
    result = {(s.name, tuple(sorted(s.labels.items()))): s.value for s in found}
    assert len(result) == len(found), "no sample twice"
    return result


def value(found: Samples, name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


def once(server: Server, condition: Callable[[Samples], bool]) -> Samples:
    """Return the samples once the condition holds: a request is counted after its response."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        found = samples(server)
        if condition(found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"never came true; the last: {found}\n{server.log}")


def call(server: Server, path: str, **options: Any) -> httpx.Response:
    """Send a request on a new connection, so that every worker gets some."""
    method = "POST" if options else "GET"
    headers = {"Authorization": f"Bearer {TOKEN}", "Connection": "close"} | options.pop("headers", {})
    url = f"http://127.0.0.1:{server.port}{path}"
    return httpx.request(method, url, headers=headers, timeout=60, trust_env=False, **options)


def stop(server: Server) -> int:
    """Stop a server; open connections would delay it by five seconds."""
    server.client.close()
    return server.stop()


def body(documents: int = 2, query: str = "red fish") -> dict[str, Any]:
    return {"query": query, "documents": ["red fish swim"] * documents}


def fill(server: Server) -> tuple[Counter[tuple[str, str]], list[httpx.Response]]:
    """Send a known set of requests; return their number by route and status, and the scored responses."""
    answers: list[tuple[str, httpx.Response]] = []

    def ask(route: str, path: str = "", **options: Any) -> None:
        answers.append((route, call(server, path or route, **options)))

    for i in range(6):
        ask("/v1/rerank", json=body(i + 1))
    ask("/api/v1/rerank", json=body())
    for _ in range(3):
        ask("/v1/rerank", json=body(), headers={"Authorization": "Bearer wrong"})
    ask(OTHER, "/nothing/here")
    ask("/api/v1/rerank", content=b" " * 5000, headers={"Content-Type": "application/json"})
    ask("/v1/rerank", json={"query": "red"})
    ask("/v1/rerank", json=body(query="too long"))
    ask("/v1/rerank", content=b"{", headers={"Content-Type": "application/json"})
    ask("/api/v1/rerank")  # 405
    ask("/v1/rerank", json={"query": "red", "documents": ["poison"]})
    together = [threading.Thread(target=ask, args=("/v1/rerank",), kwargs={"json": body(3)}) for _ in range(16)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    tally = Counter((route, str(answer.status_code)) for route, answer in answers)
    scored = [a for _, a in answers if a.status_code == 200]
    assert {s for _, s in tally} == {"200", "400", "401", "404", "405", "413", "422", "429", "500"}
    return tally, scored


SEARCH, CRAWLER = "search-0123456789", "crawler-0123456789"
ACCESS_TOKEN = f"{TOKEN},search={SEARCH},search=rotated-0123456789,crawler={CRAWLER}"


@pytest.fixture(scope="module", params=[1, 2], ids=["one worker", "two workers"])
def server(start: Start, request: pytest.FixtureRequest) -> Server:
    workers = {"WORKERS": str(request.param), "WORKER_CONNECTIONS": "1", "MAX_BODY_BYTES": "4096"}
    it = start(command=FAKE, token=TOKEN, ACCESS_TOKEN=ACCESS_TOKEN, MODEL_DEVICE="cpu", FAKE_SECONDS="0.1", **workers)
    once(it, lambda s: value(s, "reranker_ready_workers") == request.param)
    return it


def test_a_known_set_of_requests_is_counted_exactly(server: Server) -> None:
    before = samples(server)
    tally, scored = fill(server)

    def rise(now: Samples, name: str, **labels: str) -> float:
        return value(now, name, **labels) - value(before, name, **labels)

    def complete(now: Samples) -> bool:
        return sum(rise(now, "reranker_requests_total", route=r, status=s) for r, s in tally) >= tally.total()

    now = once(server, complete)
    for (route, status), count in tally.items():
        assert rise(now, "reranker_requests_total", route=route, status=status) == count, (route, status)
    for route in {route for route, _ in tally}:
        count = sum(n for (r, _), n in tally.items() if r == route)
        assert rise(now, "reranker_request_duration_seconds_count", route=route) == count

    by_status = Counter[str]()
    for (_, status), count in tally.items():
        by_status[status] += count
    kinds = {"unauthorized": "401", "body_too_large": "413", "invalid_request": "422", "malformed_body": "400"}
    kinds |= {"queue_full": "429", "scoring_failed": "500", "not_found": "404", "method_not_allowed": "405"}
    for kind, status in kinds.items():
        assert rise(now, "reranker_errors_total", error_type=kind) == by_status[status], kind

    documents = sum(len(a.json()) if isinstance(a.json(), list) else len(a.json()["results"]) for a in scored)
    prompt_tokens = sum(int(a.headers["x-prompt-tokens"]) for a in scored)
    assert rise(now, "reranker_batch_documents_sum") == documents
    assert rise(now, "reranker_prompt_tokens_total") == prompt_tokens
    # WORKER_CONNECTIONS=1: every pass holds one request, with one prefix.
    assert rise(now, "reranker_batch_tokens_sum") == prompt_tokens - PREFIX * (documents - len(scored))
    for name in ("batch_tokens", "batch_documents", "batch_duration_seconds", "batch_utilisation_ratio"):
        assert rise(now, f"reranker_{name}_count") == len(scored)
    assert rise(now, "reranker_batch_utilisation_ratio_sum") == pytest.approx(
        rise(now, "reranker_batch_tokens_sum") / 1000
    )
    assert rise(now, "reranker_queue_wait_seconds_count") == len(scored) + by_status["500"]
    for stage in ("tokenization", "inference", "total"):
        assert rise(now, "reranker_stage_seconds_count", stage=stage) == len(scored)
    assert rise(now, "reranker_stage_seconds_sum", stage="inference") >= 0.1 * len(scored)
    assert rise(now, "reranker_truncated_documents_total") == 0

    assert value(now, "reranker_requests_in_progress") == 1, "the scrape itself"
    assert value(now, "reranker_queue_tokens") == 0
    assert value(now, "reranker_batch_token_budget") == 1000
    workers = value(now, "reranker_ready_workers")
    assert value(now, "reranker_model_info", **LABELS) == workers
    assert value(now, "reranker_device_memory_bytes") == workers * (1 << 20)
    assert value(now, "reranker_workers") == workers
    assert value(now, "reranker_worker_restarts_total") == 0
    assert value(now, "reranker_demo_model_workers") == 0
    assert rise(now, "reranker_documents_total") == documents
    # Passes of 0.1 s with 11 tokens are not half full, so the speed is unknown.
    assert value(now, "reranker_queue_limit_tokens") == workers * Settings().max_queue_tokens
    versions = {"version": "0.1.0", "torch": metadata.version("torch"), "python": platform.python_version()}
    assert value(now, "reranker_build_info", **versions) == 1
    started = min(psutil.Process(child.pid).create_time() for child in psutil.Process(server.process.pid).children())
    assert started <= value(now, "reranker_start_time_seconds") <= time.time()


def test_every_request_is_counted_for_its_caller(server: Server) -> None:
    before = samples(server)

    def rise(now: Samples, name: str, **labels: str) -> float:
        return value(now, name, **labels) - value(before, name, **labels)

    tokens = Counter[str]()
    for token, caller in (
        (SEARCH, "search"),
        ("rotated-0123456789", "search"),
        (f"crawler={CRAWLER}", "crawler"),  # as a program that does not know of names would send it
        (TOKEN, "unnamed"),
    ):
        for documents in (1, 3):
            answer = call(server, "/v1/rerank", json=body(documents), headers={"Authorization": f"Bearer {token}"})
            tokens[caller] += int(answer.headers["x-prompt-tokens"])
    broken = {"Authorization": f"Bearer {SEARCH}", "Content-Type": "application/json"}
    assert call(server, "/v1/rerank", content=b"{", headers=broken).status_code == 400
    wrong = {"Authorization": f"Bearer {SEARCH}-wrong"}
    assert call(server, "/v1/rerank", json=body(), headers=wrong).status_code == 401
    assert call(server, "/livez").status_code == 200

    requests = {
        ("search", "200"): 4,
        ("crawler", "200"): 2,
        ("search", "400"): 1,
        ("none", "401"): 1,
        ("none", "200"): 1,
    }
    name = "reranker_caller_requests_total"
    now = once(server, lambda s: all(rise(s, name, caller=c, status=t) >= n for (c, t), n in requests.items()))
    for (caller, status), count in requests.items():
        assert rise(now, name, caller=caller, status=status) == count, (caller, status)
    for caller in ("search", "crawler", "unnamed", "none"):
        assert rise(now, "reranker_caller_prompt_tokens_total", caller=caller) == tokens[caller], caller
    labels = {dict(labels)["caller"] for name, labels in now if name.startswith("reranker_caller_")}
    assert labels == {"search", "crawler", "unnamed", "none"}

    def total(now: Samples, name: str) -> float:
        return sum(count for (other, _), count in now.items() if other == name)

    once(server, lambda s: total(s, name) == total(s, "reranker_requests_total"))
    assert server.log.count("access tokens: 4; with a name: 3 (crawler, search)\n") >= 1


def test_openmetrics_is_spoken_on_request(server: Server) -> None:
    answer = server.client.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    families = {family.name: family for family in parse_openmetrics(answer.text)}
    assert families["reranker_requests"].type == "counter"
    assert families["reranker_batch_tokens"].type == "histogram"
    assert families["reranker_ready_workers"].type == "gauge"


def test_promtool_finds_nothing_to_complain_about(server: Server) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here (Debian: package prometheus)")
    text = server.client.get("/metrics").text
    checked = subprocess.run([promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout + checked.stderr) == (0, "")


def test_metrics_stand_behind_the_token(server: Server) -> None:
    assert httpx.get(f"http://127.0.0.1:{server.port}/metrics", trust_env=False).status_code == 401


def test_random_paths_make_no_labels(server: Server) -> None:
    server.client.get("/random")
    before = once(server, lambda s: value(s, "reranker_requests_total", route=OTHER, status="404") > 0)
    for i in range(500):
        assert server.client.get(f"/random-{i}/{i}?q={i}").status_code == 404
    found = 500 + value(before, "reranker_requests_total", route=OTHER, status="404")
    after = once(server, lambda s: value(s, "reranker_requests_total", route=OTHER, status="404") >= found)
    assert value(after, "reranker_requests_total", route=OTHER, status="404") == found
    assert set(after) == set(before)


@pytest.mark.slow
def test_killed_workers_lose_no_counts_and_leave_no_gauges(start: Start) -> None:
    options = {"WORKERS": "2", "MODEL_DEVICE": "cpu", "FAKE_SECONDS": "0.5"}
    server = start(command=FAKE, token=TOKEN, ACCESS_TOKEN=TOKEN, **options)
    once(server, lambda s: value(s, "reranker_ready_workers") == 2)
    name, labels = "reranker_requests_total", {"route": "/v1/rerank", "status": "200"}
    for _ in range(8):
        assert call(server, "/v1/rerank", json=body()).status_code == 200
    once(server, lambda s: value(s, name, **labels) == 8)
    [folder] = folders(server)
    files = {file.name for file in folder.iterdir()}

    def hang() -> None:
        with pytest.raises(httpx.TransportError):
            call(server, "/v1/rerank", json=body(query="killed"), headers={"X-Request-Id": "never"})

    for _ in range(2):  # the second round kills the replacements, which have the same file names
        waiting = [threading.Thread(target=hang) for _ in range(4)]
        for thread in waiting:
            thread.start()
        once(server, lambda s: value(s, "reranker_requests_in_progress") == 5)
        booted = re.findall(r"Booting worker with pid: (\d+)", server.log)
        for pid in booted[-2:]:
            os.kill(int(pid), signal.SIGKILL)
        for thread in waiting:
            thread.join()
        deadline = time.monotonic() + 300
        while len(re.findall("ready after", server.log)) < len(booted) + 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        found = once(server, lambda s: value(s, "reranker_ready_workers") == 2)
        assert value(found, "reranker_requests_in_progress") == 1
        assert value(found, "reranker_queue_tokens") == 0
        assert value(found, name, **labels) == 8
        assert value(found, "reranker_batch_documents_sum") == 16
        assert value(found, "reranker_workers") == 2
        assert value(found, "reranker_worker_restarts_total") == len(booted)
    assert {file.name for file in folder.iterdir()} == files, "no files of the dead"
    call(server, "/v1/rerank", json=body())
    once(server, lambda s: value(s, name, **labels) == 9)
    stop(server)
    assert not folder.exists()


def test_a_client_that_leaves_is_no_error(start: Start) -> None:
    server = start(command=FAKE, FAKE_SECONDS="1", LOG_FORMAT="json")
    head = b"POST /v1/rerank HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 39\r\n\r\n"
    for sent in (
        b'{"query": "red"',
        b'{"query": "red", "documents": ["fish"]}',
    ):  # during the body, and after it
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(head + sent)
            once(server, lambda s: value(s, "reranker_requests_in_progress") == 2)
    found = once(server, lambda s: value(s, "reranker_requests_total", route="/v1/rerank", status="499") == 2)
    assert not [v for (name, _), v in found.items() if name == "reranker_errors_total" and v]
    assert value(found, "reranker_requests_in_progress") == 1
    assert '"ERROR"' not in server.log
    left = [line for line in map(json.loads, server.log.splitlines()) if line.get("client") == "disconnected"]
    assert [line["status"] for line in left] == [499, 499]


def test_a_reload_keeps_the_counts(start: Start) -> None:
    server = start(command=FAKE, WORKERS="2", MODEL_DEVICE="cpu")
    once(server, lambda s: value(s, "reranker_ready_workers") == 2)
    for _ in range(4):
        assert call(server, "/v1/rerank", json=body()).status_code == 200
    for generation in (2, 3):  # old and new workers overlap
        server.process.send_signal(signal.SIGHUP)
        deadline = time.monotonic() + 300
        while len(re.findall("ready after", server.log)) < 2 * generation and time.monotonic() < deadline:
            time.sleep(0.05)
        found = once(server, lambda s: value(s, "reranker_model_info", **LABELS) == 2)  # the old ones have ended
        assert value(found, "reranker_ready_workers") == 2
        assert value(found, "reranker_requests_total", route="/v1/rerank", status="200") == 4
    for sent, wanted in ((signal.SIGTTIN, 3.0), (signal.SIGTTOU, 2.0)):
        server.process.send_signal(sent)
        found = once(server, partial(has_workers, wanted))
        assert value(found, "reranker_worker_restarts_total") == 0, "nothing has ended unasked"


def has_workers(count: float, found: Samples) -> bool:
    return value(found, "reranker_workers") == value(found, "reranker_ready_workers") == count


def folders(server: Server) -> list[Path]:
    """Return the folders of shared metrics, from the memory map of the youngest worker."""
    [*_, pid] = re.findall(r"Booting worker with pid: (\d+)", server.log)
    return sorted({Path(f).parent for f in re.findall(r"\S+/counter_\d+\.db", Path(f"/proc/{pid}/maps").read_text())})


def test_the_operators_own_folder_is_used_and_kept(start: Start, tmp_path: Path) -> None:
    (tmp_path / "gauge_livesum_0.db").write_bytes(b"of a run that was killed")
    server = start(command=FAKE, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    found = once(server, lambda s: value(s, "reranker_ready_workers") == 1)
    assert value(found, "reranker_requests_in_progress") == 1
    assert folders(server) == [tmp_path]
    stop(server)
    assert (tmp_path / "counter_0.db").exists()


def test_plain_uvicorn_counts_without_a_folder(start: Start) -> None:
    server = start(command=UVICORN, ACCESS_TOKEN=TOKEN, token=TOKEN)
    for _ in range(3):
        assert server.client.post("/v1/rerank", json=body()).status_code == 200
    found = once(server, lambda s: value(s, "reranker_requests_total", route="/v1/rerank", status="200") == 3)
    assert value(found, "reranker_ready_workers") == 1
    assert value(found, "reranker_batch_documents_sum") == 6
    assert not [name for name, _ in found if name.endswith("_created")]


@pytest.mark.parametrize("folder", ["/dev/null/metrics", "/nonexistent/metrics"])
def test_a_folder_that_cannot_be_used_breaks_no_request(start: Start, folder: str) -> None:
    server = start(command=FAKE, PROMETHEUS_MULTIPROC_DIR=folder)
    assert server.client.post("/v1/rerank", json=body()).status_code == 200
    once(server, lambda s: value(s, "reranker_requests_total", route="/v1/rerank", status="200") == 1)
    assert server.log.count("no shared metrics, /metrics shows one worker's own") == 2  # app:app and tests.fake_app:app


def test_a_folder_that_is_removed_while_the_service_runs_leaves_its_own_figures(start: Start) -> None:
    server = start(command=FAKE)
    assert server.client.post("/v1/rerank", json={"query": "a", "documents": ["a"]}).status_code == 200
    [folder] = folders(server)
    shutil.rmtree(folder)
    assert server.client.post("/v1/rerank", json={"query": "a", "documents": ["a"]}).status_code == 200
    answer = server.client.get("/metrics")
    assert answer.status_code == 200
    assert 'reranker_requests_total{route="/v1/rerank",status="200"} 2.0' in answer.text
    assert "the folder of shared metrics cannot be read" in server.log
    assert stop(server) == 0


SMALL_DISK = "mount -t tmpfs -o size=1m none {folder}"


@pytest.mark.parametrize("full", ["from the start", "later"])
def test_a_full_disk_breaks_no_request(start: Start, tmp_path: Path, full: str) -> None:
    """On a real file system of 1 MiB, in a mount namespace; with the library's sparse files it would be a SIGBUS."""
    mount = SMALL_DISK.format(folder=tmp_path)
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system here (unshare -rm)")
    await_files = f"while ! ls {tmp_path} | grep -q livemin; do sleep 0.1; done"
    eat = (
        f"{{ {'true' if full == 'from the start' else await_files}; cat /dev/zero > {tmp_path}/rest; ls {tmp_path}; }}"
    )
    script = f"{mount}; {eat} {';' if full == 'from the start' else '&'} exec {' '.join(FAKE)}"
    server = start(command=["unshare", "-rm", "sh", "-c", script.replace("{", "{{").replace("}", "}}")],
                   PROMETHEUS_MULTIPROC_DIR=str(tmp_path))  # fmt: skip
    deadline = time.monotonic() + 300
    while "rest" not in server.log and time.monotonic() < deadline:
        time.sleep(0.05)
    assert "No space left on device" in server.log
    for i in range(30):
        assert server.client.post("/v1/rerank", json=body(i + 1)).status_code == 200
        server.client.get(f"/{i}")
    found = once(server, lambda s: value(s, "reranker_requests_total", route="/v1/rerank", status="200") == 30)
    assert value(found, "reranker_requests_total", route=OTHER, status="404") == 30
    assert len(re.findall("Booting worker", server.log)) == 1, "nobody died"
    assert ("no shared metrics" in server.log) == (full == "from the start")


def test_a_disk_that_is_full_for_one_of_two_workers_leaves_the_figures_of_the_other(
    start: Start, tmp_path: Path
) -> None:
    mount = SMALL_DISK.format(folder=tmp_path)  # has room for the files of one worker; both may fail on it
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system here (unshare -rm)")
    script = f"{mount}; exec {' '.join(FAKE)}".replace("{", "{{").replace("}", "}}")
    server = start(command=["unshare", "-rm", "sh", "-c", script], PROMETHEUS_MULTIPROC_DIR=str(tmp_path),
                   WORKERS="2", MODEL_DEVICE="cpu")  # fmt: skip
    until(lambda: server.log.count("ready after") == 2, "both are ready")
    assert server.log.count("no shared metrics") >= 1
    for _ in range(20):
        assert call(server, "/v1/rerank", json=body()).status_code == 200
        assert "reranker_ready_workers 1.0" in call(server, "/metrics").text
    assert "cannot be read" not in server.log


# Without a server


@pytest.fixture
def _library() -> Iterator[None]:
    """Restore the library's global value class, which `Metrics` sets."""
    before = values.ValueClass
    yield
    values.ValueClass = before


@pytest.mark.usefixtures("_library")
def test_all_that_can_be_counted_fits_into_the_space_that_was_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that grows could hit a full disk."""
    app = create_app(Settings(), FakeScorer)
    routes = [str(context.path) for context in iter_route_contexts(app.routes)]
    assert {"/v1/rerank", "/metrics", "/docs"} <= set(routes)
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    callers = [f"{'x' * 29}-{i:02}" for i in range(MAX_NAMES)]
    metrics = Metrics(str(tmp_path), "7", callers)
    statuses = {kind.status for kind in vars(errors).values() if hasattr(kind, "status")}
    assert len(statuses) > 8
    # Twice the routes of today, each with every status there is.
    for route in [OTHER, *routes, *(f"{route}/long" for route in routes)]:
        for status in statuses | {200, 404, 405, 499}:
            metrics.request_began()
            metrics.request_ended(route, status, 0.1, f"kind_{status}")
    for caller in (NONE, UNNAMED, *callers):
        for status in statuses | {200, 404, 405, 499}:
            metrics.caller_served(caller, status, 1)
    metrics.loaded(FakeScorer().info, 1)
    assert {f.name: f.stat().st_size for f in tmp_path.iterdir()} == {f"{n}_7.db": size for n, size in SIZES.items()}
    assert b'reranker_requests_total{route="/v1/rerank/long",status="499"} 1.0' in metrics.render("")[0]


@pytest.mark.usefixtures("_library")
def test_every_known_kind_of_error_starts_at_zero() -> None:
    """To Prometheus a counter that appears with 1 has not risen."""
    read = Metrics().registry.get_sample_value
    kinds = {kind.error_type for kind in vars(errors).values() if hasattr(kind, "error_type")} | {"cors_refused"}
    assert {read("reranker_errors_total", {"error_type": kind}) for kind in kinds} == {0.0}
    assert {read("reranker_score_cache_documents_total", {"result": result}) for result in ("hit", "miss")} == {0.0}
    read = Metrics(callers={"search"}).registry.get_sample_value
    for caller in ("search", "unnamed", "none"):
        assert read("reranker_caller_requests_total", {"caller": caller, "status": "200"}) == 0.0
        assert read("reranker_caller_prompt_tokens_total", {"caller": caller}) == 0.0
    assert {row.name for row in TABLE if row.zeros} == {"reranker_errors", "reranker_score_cache_documents"}


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(
    "content", [b"", b"abc", struct.pack("i", 64) + b"\x7f" * 100], ids=["empty", "short", "nonsense"]
)
def test_a_file_of_a_sibling_that_is_not_whole_leaves_its_own_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    metrics = Metrics(str(tmp_path), "7")
    metrics.request_began()
    (tmp_path / "counter_8.db").write_bytes(content)
    assert b"reranker_requests_in_progress 1.0" in metrics.render("")[0]


@pytest.mark.usefixtures("_library")
def test_a_pass_of_several_requests(tmp_path: Path) -> None:
    metrics = Metrics()
    scorer = FakeScorer(max_batch_tokens=100)

    async def main() -> None:
        batcher = Batcher(lambda: scorer, observer=metrics)
        await batcher.start()
        while batcher.status == "loading":
            await asyncio.sleep(0.001)
        scorer.hold.clear()
        tasks = [asyncio.create_task(batcher.rerank(RerankRequest("red", ["red"]), 30))]
        while not scorer.passes:
            await asyncio.sleep(0.001)
        tasks += [asyncio.create_task(batcher.rerank(RerankRequest("a", ["b c"] * 3), 30)) for _ in range(2)]
        while len(batcher.queue) < 2:
            await asyncio.sleep(0.001)
        assert metrics.registry.get_sample_value("reranker_queue_tokens") == 2 * (PREFIX + 6)
        tasks[2].cancel()
        await asyncio.gather(tasks[2], return_exceptions=True)
        assert metrics.registry.get_sample_value("reranker_queue_tokens") == PREFIX + 6
        tasks[2] = asyncio.create_task(batcher.rerank(RerankRequest("a", ["b c"] * 3), 30))
        while len(batcher.queue) < 2:
            await asyncio.sleep(0.001)
        scorer.hold.set()
        await asyncio.gather(*tasks)
        assert metrics.registry.get_sample_value("reranker_ready_workers") == 1
        batcher.drain()
        assert metrics.registry.get_sample_value("reranker_ready_workers") == 0
        await batcher.stop()

    asyncio.run(main())
    assert [len(p) for p in scorer.passes] == [1, 2]
    read = metrics.registry.get_sample_value
    assert read("reranker_batch_tokens_sum") == (PREFIX + 1) + 2 * (PREFIX + 6)
    assert read("reranker_prompt_tokens_total") == (PREFIX + 1) + 2 * (3 * PREFIX + 6)
    assert read("reranker_batch_documents_sum") == 7
    assert read("reranker_batch_utilisation_ratio_sum") == pytest.approx(0.11 + 0.32)
    assert read("reranker_queue_wait_seconds_count") == 3
    assert read("reranker_queue_tokens") == 0
    assert read("reranker_documents_total") == 7
    assert read("reranker_workers") == 1


@pytest.mark.usefixtures("_library")
def test_a_worker_without_a_model_does_not_lower_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file may stay: gunicorn calls no hook for a worker whose failed load stops a new generation."""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    failed = Metrics(str(tmp_path), "0b")
    assert b"reranker_batch_token_budget" not in failed.render("")[0]
    Metrics(str(tmp_path), "0").loaded(FakeScorer(max_batch_tokens=1000).info, 1)
    assert b"\nreranker_batch_token_budget 1000.0\n" in failed.render("")[0]
    alone = Metrics()
    alone.loaded(FakeScorer(max_batch_tokens=1000).info, 1)
    assert alone.registry.get_sample_value("reranker_batch_token_budget") == 1000


@pytest.mark.usefixtures("_library")
def test_the_limit_of_the_queue_is_what_can_be_scored_in_time() -> None:
    metrics = Metrics()

    def read() -> float | None:
        return metrics.registry.get_sample_value("reranker_queue_limit_tokens")

    async def main() -> None:
        scorer = FakeScorer(max_batch_tokens=20, seconds=0.05)
        batcher = Batcher(lambda: scorer, max_queue_tokens=10**9, request_timeout=10, observer=metrics)
        assert read() == 10**9
        await batcher.start()
        await batcher.wait_until_loaded()
        await batcher.rerank(RerankRequest("red", ["red"]), 10)  # 11 of 20 tokens: at least half full
        await batcher.stop()
        assert read() == batcher.admission.limit(10)

    asyncio.run(main())
    assert 0 < (read() or 0) <= 11 / 0.05 * 10


@pytest.mark.usefixtures("_library")
def test_a_bug_is_answered_with_the_id_that_finds_it_and_is_counted() -> None:
    app = create_app(Settings(), FakeScorer)

    @app.get("/v1/bug")
    async def bug() -> None:
        raise RuntimeError("confidential")

    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/v1/bug", headers={"X-Request-Id": "bug-1"})

    answer = asyncio.run(main())
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "bug-1")
    assert answer.json()["error_type"] == "internal_error"
    assert "confidential" not in answer.text
    metrics = service_of(app).metrics
    assert metrics.registry.get_sample_value("reranker_errors_total", {"error_type": "internal_error"}) == 1


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize(("disconnected", "status"), [(True, "499"), (False, "500")])
def test_what_is_nobodys_fault_and_what_is_ours(disconnected: bool, status: str) -> None:
    metrics = Metrics()

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        if not disconnected:
            raise RuntimeError("a bug")
        context_of(scope).error_type = "not_ready"
        context_of(scope).client_disconnected = True

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/rerank", "headers": [], "query_string": b""}
        await AccessLog(inner, metrics, {"/v1/rerank"})(scope, None, None)  # type: ignore[arg-type]

    if disconnected:
        asyncio.run(main())
    else:
        with pytest.raises(RuntimeError, match="a bug"):
            asyncio.run(main())
    read = metrics.registry.get_sample_value
    assert read("reranker_requests_total", {"route": "/v1/rerank", "status": status}) == 1
    assert read("reranker_errors_total", {"error_type": "internal_error"}) == (0 if disconnected else 1)
    assert read("reranker_errors_total", {"error_type": "not_ready"}) == 0
    assert read("reranker_requests_in_progress") == 0


def test_the_memory_of_a_cpu_is_that_of_the_process(model_path: Path) -> None:
    scorer = Scorer.load(model_path, device="cpu", max_batch_tokens=1024)
    assert scorer.memory == pytest.approx(psutil.Process().memory_info().rss, rel=0.1)


def test_prometheus_is_known_in_one_place() -> None:
    users = [p for p in (ROOT / "reranker").rglob("*.py") if "prometheus_client" in top(imports(p))]
    assert users == [ROOT / "reranker" / "http" / "metrics.py"]
