"""The cost of the service: requests a second with a free model, and the share of time outside a real one.

    python -m benchmarks.overhead [--rounds 10] [--seconds 3] [--clients 1 16] [--shape mid] [--requests 8]

First, requests of ten documents of ten words over kept connections, with a token and the default access log: the
service around a scorer that costs nothing, the same with real tokenising and packing (benchmarks/free_app.py), and
FastAPI alone under the same gunicorn (benchmarks/bare_app.py). They alternate in every round, and the ratio to the bare
one is that of the same round, so that a busy machine slows both. The worker's processor time is steadier than any rate,
because the load generator, a process of its own, needs part of the machine too.

Then the service around a real model: of the time while requests are in progress, and of the worker's processor time,
the share that is not spent in forward passes (benchmarks/timed_app.py). Ends with a line for each promise and exits
with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import psutil
import uvloop

from benchmarks.launch import Service, serve
from benchmarks.models import SHAPES, model
from benchmarks.report import header, percentile, table
from benchmarks.wire import Wire
from benchmarks.workloads import read

TOKEN = "secret"
DOCUMENTS, WORDS = 10, 10
FREE, TOKENISED, BARE = "service, free scorer", "service, tokenised and packed", "bare FastAPI"
CONTESTANTS: dict[str, tuple[str, dict[str, object]]] = {
    FREE: ("benchmarks.free_app:app", {}),
    TOKENISED: ("benchmarks.free_app:app", {"TOKENISED": 1}),
    BARE: ("benchmarks.bare_app:app", {}),
}
LEAST_RATE = 1500
MOST_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class Round:
    """One contestant under load for some seconds."""

    seconds: float
    processor_seconds: float
    """Of the worker."""
    client_seconds: float
    """Processor seconds of the load generator."""
    latencies: Sequence[float]
    """Seconds of every answer."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.latencies) / self.seconds

    @property
    def cost(self) -> float:
        """Processor seconds of the worker per request."""
        return self.processor_seconds / len(self.latencies)


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a time in which requests were always in progress, or of the difference between two moments."""

    wall: float
    processor: float
    """Of the worker."""
    model_wall: float
    """In forward passes."""
    model_processor: float

    @property
    def outside(self) -> float:
        """Share of the time in which no forward pass ran."""
        return 1 - self.model_wall / self.wall

    @property
    def outside_processor(self) -> float:
        """Share of the worker's processor time that no forward pass took."""
        return 1 - self.model_processor / self.processor

    def since(self, before: Spent) -> Spent:
        """From there to here."""
        return Spent(
            self.wall - before.wall,
            self.processor - before.processor,
            self.model_wall - before.model_wall,
            self.model_processor - before.model_processor,
        )


class Client(asyncio.Protocol):
    """A connection whose next request follows its answer at once, until the time is over.

    Args:
        request: the bytes of one.
        until: when it sends no more, by `time.perf_counter`.

    Raises:
        RuntimeError: from `done`: an answer was not a 200, or the server hung up.
    """

    _LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n", re.IGNORECASE)

    def __init__(self, request: bytes, until: float) -> None:
        self.request, self.until = request, until
        self.latencies: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._came = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin."""
        self._transport = transport
        self._ask()

    def data_received(self, data: bytes) -> None:
        """A piece of an answer."""
        self._came += data
        head, end, body = self._came.partition(b"\r\n\r\n")
        length = self._LENGTH.search(head + b"\r\n")
        if not end or (length is not None and len(body) < int(length[1])):
            return
        self.latencies.append(time.perf_counter() - self._asked)
        if length is None or not head.startswith(b"HTTP/1.1 200"):
            self._end(RuntimeError(self._came.decode("latin-1")))
        elif time.perf_counter() < self.until:
            self._ask()
        else:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """By the server, unless this was the end."""
        self._end(RuntimeError("the server hung up"))

    def _ask(self) -> None:
        self._came = b""
        self._asked = time.perf_counter()
        self._transport.write(self.request)

    def _end(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None) if error is None else self.done.set_exception(error)
            self._transport.close()


async def load(port: int, request: bytes, clients: int, seconds: float) -> list[float]:
    """Run `clients` clients with one request at a time each; return the seconds of each response.

    Raises:
        RuntimeError: an answer was not a 200.
    """
    loop, until = asyncio.get_running_loop(), time.perf_counter() + seconds
    made = [await loop.create_connection(lambda: Client(request, until), "127.0.0.1", port) for _ in range(clients)]
    await asyncio.gather(*(client.done for _, client in made))
    return [latency for _, client in made for latency in client.latencies]


def content() -> bytes:
    """Ten documents of ten words, from the workload."""
    texts = (d.split() for r in read("short") for d in r["documents"] if d.isascii())
    documents = [" ".join(words[:WORDS]) for words in texts if len(words) >= WORDS][:DOCUMENTS]
    return json.dumps({"query": "how to compress files on Linux", "documents": documents}).encode()


def post(body: bytes) -> bytes:
    """The whole request."""
    head = "POST /v1/rerank HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Authorization: Bearer {TOKEN}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def worker(service: Service) -> psutil.Process:
    """The worker process."""
    only: psutil.Process
    [only] = psutil.Process(service.pid).children()
    return only


def processor_seconds(process: psutil.Process) -> float:
    """Since its start, in user and system mode."""
    times = process.cpu_times()
    return float(times.user + times.system)


def run(service: Service, request: bytes, clients: int, seconds: float) -> Round:
    """One round."""
    serving = worker(service)
    start, used, own = time.perf_counter(), processor_seconds(serving), time.process_time()
    latencies = uvloop.run(load(service.port, request, clients, seconds))
    own = time.process_time() - own
    return Round(time.perf_counter() - start, processor_seconds(serving) - used, own, latencies)


def row(name: str, clients: int, rounds: Sequence[Round], bare: Sequence[Round]) -> list[str]:
    """A line of the first table: medians over rounds; times in milliseconds."""
    median = statistics.median
    return [
        name,
        str(clients),
        f"{median(r.rate for r in rounds):,.0f}",
        f"{median(r.cost for r in rounds) * 1e3:.3f}",
        f"{median(r.cost / b.cost for r, b in zip(rounds, bare, strict=True)):.2f}",
        f"{median(percentile(r.latencies, 50) for r in rounds) * 1e3:.2f}",
        f"{median(percentile(r.latencies, 99) for r in rounds) * 1e3:.2f}",
        f"{median(r.client_seconds / len(r.latencies) for r in rounds) * 1e3:.3f}",
    ]


HEAD = ["", "clients", "requests/s", "CPU ms a request", "by bare", "p50, ms", "p99, ms", "load generator, CPU ms"]


async def around(port: int, bodies: Sequence[bytes], clients: int, serving: psutil.Process) -> Spent:
    """The time spent while `clients` clients send all of these requests.

    Raises:
        RuntimeError: an answer was not a 200.
    """
    waiting = iter(bodies)

    async def client(wire: Wire) -> None:
        for body in waiting:
            answer = await wire.ask("/v1/rerank", body)
            if answer.status != 200:
                raise RuntimeError(answer.body.decode())

    async def now(wire: Wire) -> Spent:
        told = json.loads((await wire.ask("/spent")).body)
        return Spent(time.perf_counter(), processor_seconds(serving), told["wall"], told["processor"])

    async with Wire(port, TOKEN) as wire:
        before = await now(wire)
        await asyncio.gather(*(client(wire) for _ in range(clients)))
        return (await now(wire)).since(before)


def beside(shape: str, requests: int, clients: Sequence[int]) -> dict[int, Spent]:
    """The time spent around the model, by the number of clients. Every client has at least one request."""
    bodies = [json.dumps(request).encode() for request in read("short", requests)]
    settings = {"MODEL_NAME_OR_PATH": model(shape), "MODEL_DEVICE": "cpu", "MODEL_PRECISION": "float32"}
    with serve("benchmarks.timed_app:app", ACCESS_TOKEN=TOKEN, REQUEST_TIMEOUT=1000, **settings) as service:
        serving = worker(service)
        asyncio.run(around(service.port, bodies[:1], 1, serving))  # the first one is cold
        return {n: asyncio.run(around(service.port, bodies * -(-n // len(bodies)), n, serving)) for n in clients}


def promises(rounds: Sequence[Round], spent: dict[int, Spent]) -> list[tuple[str, bool]]:
    """Each promise with its figure, and whether it was kept."""
    rate = statistics.median(r.rate for r in rounds)
    share = max(s.outside for s in spent.values())
    return [
        (f"{rate:,.0f} requests/s of a free scorer, at least {LEAST_RATE:,}", rate >= LEAST_RATE),
        (f"{share:.2%} of the time outside the model, at most {MOST_SHARE:.0%}", share <= MOST_SHARE),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--seconds", type=int, default=3, help="of every contestant in a round")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--requests", type=int, default=8, help="of the workload, with the real model")
    parser.add_argument("--around", type=int, nargs="+", default=[1, 8], help="clients, with the real model")
    a = parser.parse_args()
    body = content()
    measured: dict[tuple[int, str], list[Round]] = {(n, name): [] for n in a.clients for name in CONTESTANTS}
    with ExitStack() as running:
        services = {
            name: running.enter_context(serve(app, ACCESS_TOKEN=TOKEN, **settings))
            for name, (app, settings) in CONTESTANTS.items()
        }
        for service in services.values():
            run(service, post(body), max(a.clients), 1)
        for _ in range(a.rounds):
            for n, name in measured:
                measured[n, name].append(run(services[name], post(body), n, a.seconds))
    spent = beside(a.shape, a.requests, a.around)

    kept = promises(measured[max(a.clients), FREE], spent)
    print(header(), end="\n\n")
    print(
        f"One worker, a body of {len(body)} bytes, {DOCUMENTS} documents; {a.rounds} rounds of {a.seconds} s, median.\n"
    )
    print(table(HEAD, [row(name, n, rounds, measured[n, BARE]) for (n, name), rounds in measured.items()]), end="\n\n")
    print(f"Model {a.shape} (random weights, float32), short.json, {a.requests} requests; one thread computes.\n")
    rows = [
        [str(n), f"{s.wall:.1f}", f"{s.model_wall:.1f}", f"{s.outside:.2%}", f"{s.outside_processor:.2%}"]
        for n, s in spent.items()
    ]
    head = ["clients", "seconds", "in forward passes", "time outside the model", "processor time outside the model"]
    print(table(head, rows), end="\n\n")
    for text, good in kept:
        print(f"- {'kept' if good else 'BROKEN'}: {text}")
    sys.exit(not all(good for _, good in kept))


if __name__ == "__main__":
    main()
