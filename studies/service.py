"""The service under load, beside peers: documents per second, latency and failures, closed and open loop.

    python -m studies.service [--shape mid] [--workload short] [--requests 4] [--documents N] [--rounds 2]
                               [--clients 1 8 64] [--rates 0.5 0.8] [--vllm PATH/bin/vllm] [--peer NAME=URL ...]

Closed loop: each client has one request at a time. Open loop: Poisson arrivals at the given shares of this service's
best closed-loop rate, the same arrivals for all servers. One server is under load at a time; the others are stopped.
Every query has a new word, so no score is cached; documents of one request still share their prefix. `studies/vllm.sh`
installs vLLM.
"""

from __future__ import annotations

import argparse
import json
import math
import queue
import random
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.launch import Service, free_port, run, serve
from benchmarks.models import SHAPES, model
from benchmarks.peers import CHAT_TEMPLATE
from benchmarks.report import header, table
from benchmarks.workloads import Requests, read

MODEL = "qwen3-reranker"


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
        return self.service.processor_seconds() if self.service else 0.0

    def pause(self, paused: bool) -> None:
        """Stop or continue it."""
        if self.service:
            self.service.pause(paused)


@dataclass
class Load:
    """The result of one server under one load."""

    seconds: float = 0.0
    processor_seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def percentile(self, share: float) -> float:
        """Nearest rank, in seconds."""
        ordered = sorted(self.latencies)
        return ordered[math.ceil(share * len(ordered)) - 1] if ordered else math.nan


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--workload", default="short", help="short or long")
    parser.add_argument("--requests", type=int, default=4, help="requests of the workload to use")
    parser.add_argument("--documents", type=int, help="documents of each request to use; all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rates", type=float, nargs="*", default=[0.5, 0.8], help="open loop, shares of the capacity")
    parser.add_argument("--open-seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vllm", type=Path, help="vLLM's program: it is started too")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="a running server's rerank URL")
    a = parser.parse_args()
    path = model(a.shape)
    work = read(a.workload, a.requests, a.documents)
    with ExitStack() as stack:
        running = [stack.enter_context(_ours(path, a.threads))]
        if a.vllm:
            running.append(stack.enter_context(_vllm(a.vllm, path, a.threads)))
        running += [Running(*peer.split("=", 1)) for peer in a.peer]
        _measure(a, work, running)


@contextmanager
def _ours(path: Path, threads: int) -> Iterator[Running]:
    """This service under gunicorn, as `make serve` starts it."""
    settings: dict[str, object] = {"MODEL_NAME_OR_PATH": path, "OMP_NUM_THREADS": threads, "LOG_LEVEL": "WARNING"}
    settings |= {"MODEL_DEVICE": "cpu", "MODEL_PRECISION": "float32", "REQUEST_TIMEOUT": 600}
    settings |= {"TIMEOUT": 3600}  # the master would replace a worker that is stopped for a peer's turn
    with serve("app:app", **settings) as service:
        yield Running("this service", f"http://127.0.0.1:{service.port}/v1/rerank", service)


@contextmanager
def _vllm(binary: Path, path: Path, threads: int, block: int = 32) -> Iterator[Running]:
    """vLLM with the overrides and the template without which its scores of this model are wrong.

    Blocks of 32: the shared prefix is shorter than vLLM's default block of 128, which would share nothing.
    """
    port = free_port()
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
        "dtype": "float32",
        "max-model-len": "8192",
        "block-size": str(block),
        "hf-overrides": json.dumps(overrides),
        "chat-template": str(template),
    }
    command = [str(binary), "serve", str(path), "--enable-prefix-caching"]
    for name, value in options.items():
        command += [f"--{name}", value]
    env = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1"}
    env |= {"VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}  # the default reserves one core for the front end: half of two
    env |= {"VLLM_LOGGING_LEVEL": "WARNING", "OMP_NUM_THREADS": str(threads)}
    running = Running(f"vLLM, block {block}", f"http://127.0.0.1:{port}/v1/rerank")

    def ready() -> bool:
        try:
            with httpx.Client(timeout=120, trust_env=False) as client:
                _rerank(client, running, "warm-up", ["a document"] * 8)
        except httpx.HTTPError:
            return False
        return True

    with run(command, port, env, ready, seconds=600) as running.service:
        yield running


def _measure(a: argparse.Namespace, work: Requests, running: list[Running]) -> None:
    print(header(), end="\n\n")
    per_request = statistics.mean(len(r["documents"]) for r in work)
    print(f"Model {a.shape} (random weights, float32), {a.workload}.json: {len(work)} requests of {per_request:.0f}")
    print(f"documents, {a.threads} thread(s) each; {a.rounds} rounds. Apart: largest difference of a probability.\n")
    reference: list[list[float]] = []
    apart: dict[str, float] = {}
    for server in running:
        with _alone(server, running), httpx.Client(timeout=600, trust_env=False) as client:
            scores = [_rerank(client, server, r["query"], r["documents"]) for r in work]
        reference = reference or scores
        apart[server.name] = max(
            abs(x - y) for s, t in zip(scores, reference, strict=True) for x, y in zip(s, t, strict=True)
        )

    rows, best = [], 0.0
    failures: list[str] = []
    for clients in a.clients:
        loads: dict[str, list[Load]] = {server.name: [] for server in running}
        for _ in range(a.rounds):
            for server in running:
                with _alone(server, running):
                    loads[server.name].append(_closed(server, work, clients))
        rate = {n: len(work) * per_request / statistics.median(x.seconds for x in of) for n, of in loads.items()}
        best = max(best, rate[running[0].name])
        for server in running:
            of = loads[server.name]
            used = statistics.median(x.processor_seconds for x in of) / (len(work) * per_request) * 100
            cores = statistics.median(x.processor_seconds / x.seconds for x in of)
            row = [
                server.name,
                str(clients),
                f"{rate[server.name]:.2f}",
                f"{rate[running[0].name] / rate[server.name]:.2f}",
            ]
            row += [f"{used:.1f}", f"{cores:.2f}"] if server.service else ["-", "-"]
            rows.append([*row, *_times(of), f"{apart[server.name]:.1e}"])
            failures += [f"{server.name}, {clients} clients: {failure}" for load in of for failure in load.failures]
    head = ["server", "clients", "documents/s", "ours is faster", "CPU s / 100 documents", "cores used"]
    print(table([*head, "p50 s", "p95 s", "p99 s", "failed", "apart"], rows))
    print(
        "\nReady after: " + ", ".join(f"{s.name} {s.service.ready_after:.0f} s" for s in running if s.service), end=". "
    )
    print(
        "Resident: " + ", ".join(f"{s.name} {s.service.memory() / 2**30:.1f} GiB" for s in running if s.service) + ".\n"
    )

    rows = []
    for share in a.rates:
        rate_per_second = share * best / per_request
        arrivals = _arrivals(rate_per_second, a.open_seconds)
        for server in running:
            with _alone(server, running):
                load = _open(server, work, arrivals)
            rows.append([server.name, f"{share:.0%}", f"{rate_per_second:.2f}", str(len(arrivals)), *_times([load])])
            failures += [f"{server.name}, {share:.0%}: {failure}" for failure in load.failures]
    if rows:
        head = ["server", "of our capacity", "requests/s", "requests", "p50 s", "p95 s", "p99 s", "failed"]
        print(table(head, rows))
    print(*sorted(set(failures)), sep="\n")


@contextmanager
def _alone(server: Running, running: list[Running]) -> Iterator[None]:
    others = [other for other in running if other is not server]
    for other in others:
        other.pause(True)
    try:
        yield
    finally:
        for other in others:
            other.pause(False)


def _times(loads: list[Load]) -> list[str]:
    whole = Load(
        latencies=[x for load in loads for x in load.latencies], failures=[f for x in loads for f in x.failures]
    )
    return [*(f"{whole.percentile(p):.2f}" for p in (0.5, 0.95, 0.99)), str(len(whole.failures))]


def _closed(server: Running, work: Requests, clients: int) -> Load:
    """The workload, so often that every client has at least one request; the times are those of one workload."""
    load, waiting = Load(), queue.Queue[dict[str, Any]]()
    repeats = math.ceil(clients / len(work))
    for request in work * repeats:
        waiting.put(request)

    def client() -> None:
        with httpx.Client(timeout=600, trust_env=False) as http:
            while True:
                try:
                    request = waiting.get_nowait()
                except queue.Empty:
                    return
                _ask(http, server, request, load)

    _timed(load, server, [threading.Thread(target=client) for _ in range(clients)])
    load.seconds /= repeats
    load.processor_seconds /= repeats
    return load


def _open(server: Running, work: Requests, arrivals: list[float]) -> Load:
    load, start = Load(), 0.0

    def arrive(at: float, request: dict[str, Any]) -> None:
        time.sleep(max(0.0, start + at - time.perf_counter()))
        with httpx.Client(timeout=600, trust_env=False) as http:
            _ask(http, server, request, load, due=start + at)

    threads = [threading.Thread(target=arrive, args=(at, work[i % len(work)])) for i, at in enumerate(arrivals)]
    start = time.perf_counter() + 0.2
    _timed(load, server, threads)
    return load


def _timed(load: Load, server: Running, threads: list[threading.Thread]) -> None:
    used, start = server.processor_seconds(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - start
    load.processor_seconds = server.processor_seconds() - used


def _ask(http: httpx.Client, server: Running, request: dict[str, Any], load: Load, due: float | None = None) -> None:
    start = due or time.perf_counter()
    salt = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5))
    try:
        scores = _rerank(http, server, f"{request['query']} {salt}", request["documents"])
        if any(map(math.isnan, scores)):
            load.failures.append("not every document has a score")
    except (httpx.HTTPError, KeyError) as error:
        load.failures.append(str(error) or type(error).__name__)
    load.latencies.append(time.perf_counter() - start)


def _rerank(http: httpx.Client, server: Running, query: str, documents: list[str]) -> list[float]:
    answer = http.post(server.url, json={"model": MODEL, "query": query, "documents": documents})
    answer.raise_for_status()
    scores = [math.nan] * len(documents)
    for row in answer.json()["results"]:
        scores[row["index"]] = row["relevance_score"]
    return scores


def _arrivals(rate: float, seconds: float) -> list[float]:
    """Poisson arrivals, the same in every run."""
    source, at, times = random.Random(7), 0.0, []
    while (at := at + source.expovariate(rate)) < seconds:
        times.append(at)
    return times


if __name__ == "__main__":
    main()
