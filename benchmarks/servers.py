"""The service under load beside peers: documents a second, CPU seconds, cores, memory, latency, difference of scores.

    python -m benchmarks.servers [--shape mid] [--workloads short drawn] [--requests 4] [--documents N] [--seed 0]
                                 [--clients 1 8 64] [--rounds 3] [--precision float32] [--threads 2]
                                 [--peers vllm infinity] [--peer NAME=URL ...] [--floor] [--rows FILE]

Each client has one request at a time. One server is under load at a time, by turns; the others are stopped. Every query
has a new word, so no score is cached; documents of one request still share their prefix. A server that uses fewer cores
than it may is marked. `--floor` adds the products alone (benchmarks.floor) and each server's share of them; `--rows`
appends what was measured to a file for `benchmarks.plot`. benchmarks/environments/ installs the peers.
"""

from __future__ import annotations

import argparse
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

from benchmarks.engine import tokens
from benchmarks.floor import Floor, floor
from benchmarks.models import MODELS, model
from benchmarks.plot import Row, append
from benchmarks.reference import Reference
from benchmarks.report import fewer_cores, header, percentile, table
from benchmarks.serving import PEERS, Running, installed, ours
from benchmarks.workloads import NAMES, Requests, read


@dataclass
class Load:
    """The result of one server under one load."""

    seconds: float = 0.0
    """For the workload once, as processor_seconds and documents."""
    processor_seconds: float = 0.0
    documents: float = 0.0
    """That got a score: a request that fails is no work."""
    scored: list[int] = field(default_factory=list)
    """By request that got a response."""
    latencies: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Documents a second."""
        return self.documents / self.seconds

    @property
    def each(self) -> float:
        """Processor seconds for a document; infinite where none got a score."""
        return self.processor_seconds / self.documents if self.documents else math.inf


def main() -> None:
    """Measure and print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="mid")
    parser.add_argument("--workloads", nargs="+", choices=NAMES, default=["short", "drawn"])
    parser.add_argument("--requests", type=int, default=4, help="requests of each workload to use")
    parser.add_argument("--documents", type=int, help="documents of each request to use; all")
    parser.add_argument("--seed", type=int, default=0, help="of the workload `drawn`")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, help="to start; all that are installed and serve the shape"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL", help="a running server's rerank URL")
    parser.add_argument("--floor", action="store_true", help="measure the products alone, too")
    parser.add_argument("--rows", type=Path, help="append the measured rows to this file")
    a = parser.parse_args()
    path = model(a.shape)
    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights, {a.precision}), {a.threads} core(s) for each server, {a.rounds} rounds.")
    with ExitStack() as stack:
        starts = [ours, *(PEERS[name] for name in (installed(a.shape) if a.peers is None else a.peers))]
        running: list[Running] = []
        for start in starts:
            with _alone(None, running):
                running.append(stack.enter_context(start(a.shape, path, a.threads, a.precision)))
        running += [Running(*peer.split("=", 1)) for peer in a.peer]
        started = [server for server in running if server.service]
        print(
            "Ready after: " + ", ".join(f"{s.name} {s.service.ready_after:.0f} s" for s in started if s.service) + "."
        )
        for workload in a.workloads:
            _measure(a, path, workload, running)
        peaks = [f"{s.name} {s.service.peak_memory() / 2**30:.1f} GiB" for s in started if s.service]
        print(f"\nPeak memory: {', '.join(peaks)} (the peaks of all processes, added up).")
    print("Ratios: medians over rounds. FEWER: below 85% of its cores. Apart: as in benchmarks.engine.")


def _measure(a: argparse.Namespace, path: Path, workload: str, running: list[Running]) -> None:
    """One workload at every number of clients."""
    work = read(workload, a.requests, a.documents, a.seed)
    documents = sum(len(r["documents"]) for r in work)
    with _alone(None, running):
        reference = Reference(path, work)
        packed = tokens(a.shape, path, work)[0]
    apart: dict[str, float] = {}
    for server in running:
        with _alone(server, running), httpx.Client(timeout=600, trust_env=False) as client:
            apart[server.name] = reference.apart([server.rerank(client, work[0]["query"], work[0]["documents"])])
    rows: list[list[str]] = []
    failures: list[str] = []
    for clients in a.clients:
        loads: dict[str, list[Load]] = {server.name: [] for server in running}
        floors: list[Floor] = []
        for turn in range(a.rounds):
            if a.floor:
                with _alone(None, running):
                    floors.append(floor(a.shape, "cpu", getattr(torch, a.precision), packed, a.threads))
            for server in running[:: -1 if turn % 2 else 1]:
                with _alone(server, running):
                    loads[server.name].append(closed(server, work, clients))
        least = statistics.median(documents / f.seconds for f in floors) if floors else math.nan
        for name, of in loads.items():
            rates = [load.rate for load in of]
            rate, used = statistics.median(rates), statistics.median(load.each for load in of) * 100
            cores = statistics.median(load.processor_seconds / load.seconds for load in of)
            row = [name, str(clients), f"{rate:.2f}", f"{min(rates):.2f} to {max(rates):.2f}", f"{used:.1f}"]
            row += [fewer_cores(cores, a.threads), *_times(of, loads[running[0].name])]
            row += [f"{rate / least:.0%}"] if floors else []
            latencies = [x for load in of for x in load.latencies]
            row += [f"{percentile(latencies, p):.2f}" for p in (50, 95)]
            rows.append([*row, str(sum(len(x.failures) for x in of)), f"{apart[name]:.1e}"])
            failures += [f"{name}, {clients} clients: {failure}" for load in of for failure in load.failures]
            if a.rows:
                append(a.rows, Row(a.shape, a.precision, workload, clients, name, rate, used, cores))
        if floors:
            used = statistics.median(f.processor_seconds for f in floors) / documents * 100
            rows.append([f"floor: {floors[0].product}", str(clients), f"{least:.2f}", "-", f"{used:.1f}"])
            rows[-1] += [*3 * ["-"], "100%", *4 * ["-"]]
    print(f"\n{workload}: {len(work)} requests, {documents} documents, {packed} packed tokens.\n")
    head = ["server", "clients", "documents/s", "of a round", "CPU s / 100 documents", "cores used"]
    head += ["times our wall", "times our CPU s", *(["of the floor"] if a.floor else []), "p50 s", "p95 s", "failed"]
    print(table([*head, "apart"], rows))
    print(*sorted(set(failures)), sep="\n", end="", flush=True)


def _times(of: list[Load], ours: list[Load]) -> list[str]:
    """How many times our wall and processor seconds a server needs for a document: medians of the rounds' ratios."""
    wall = statistics.median(o.rate / x.rate if x.rate else math.inf for x, o in zip(of, ours, strict=True))
    used = statistics.median(x.each / o.each for x, o in zip(of, ours, strict=True))
    return [f"{wall:.2f}", f"{used:.2f}"]


@contextmanager
def _alone(server: Running | None, running: list[Running]) -> Iterator[None]:
    """Stop all servers but one."""
    others = [other for other in running if other is not server]
    for other in others:
        other.pause(True)
    try:
        yield
    finally:
        for other in others:
            other.pause(False)


def closed(server: Running, work: Requests, clients: int) -> Load:
    """The workload, so often that every client has at least one request."""
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

    threads = [threading.Thread(target=client) for _ in range(clients)]
    used, start = server.processor_seconds(), time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = (time.perf_counter() - start) / repeats
    load.processor_seconds = (server.processor_seconds() - used) / repeats
    load.documents = sum(load.scored) / repeats
    return load


def _ask(http: httpx.Client, server: Running, request: dict[str, Any], load: Load) -> None:
    start = time.perf_counter()
    salt = "".join(random.choices("abcdefghijklmnopqrstuvwxyz", k=5))
    try:
        scores = server.rerank(http, f"{request['query']} {salt}", request["documents"])
        load.scored.append(sum(not math.isnan(score) for score in scores))
        if load.scored[-1] < len(scores):
            load.failures.append("not every document has a score")
    except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:  # any of a response of another form
        load.failures.append(f"{type(error).__name__}: {error}".removesuffix(": "))
    load.latencies.append(time.perf_counter() - start)


if __name__ == "__main__":
    main()
