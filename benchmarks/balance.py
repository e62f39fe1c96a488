"""Requests of clients that keep their connections, to several workers on one host: which worker gets how many.

    python -m benchmarks.balance [--seconds 6] [--rounds 5] [--workers 2 4] [--clients 8 16 64]

A real gunicorn whose workers have a device each that waits instead of computing (benchmarks/sleeping_app.py). Twice, by
turns: as it is, and without a folder that its workers share, so that the kernel alone decides which of them gets a
connection. First clients that ask one request after another, each on its own connection; then requests at random
moments (Poisson) over one pool of connections, as a gateway has it.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import tempfile
import time
import timeit
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

from benchmarks.launch import Service, serve
from benchmarks.overload import TOKENS, content
from benchmarks.report import header, percentile, table
from benchmarks.wire import Wire
from reranker.server.siblings import Siblings

APP = "benchmarks.sleeping_app:app"
AT_ONCE = 5
"""Requests in a full pass of a device, on average."""
PASS_SECONDS = 0.2
OVERHEAD = 0.05
"""Seconds of a pass that do not depend on its tokens: wasted when a request has a pass of its own."""
RATE = AT_ONCE / PASS_SECONDS
"""Requests a second that one worker's device can score."""
LOADS = (0.5, 0.7, 0.9)
MODES: dict[str, dict[str, str]] = {"kernel alone": {"PROMETHEUS_MULTIPROC_DIR": "/dev/null"}, "balanced": {}}
SETTINGS = {
    "RATE": AT_ONCE * TOKENS / (PASS_SECONDS - OVERHEAD),
    "OVERHEAD": OVERHEAD,
    "BATCH_TOKENS": AT_ONCE * TOKENS,
    "MODEL_DEVICE": "cpu",
    "LOG_FORMAT": "%(process)d %(message)s",
}

Ask = Callable[[int], Coroutine[None, None, list[float]]]
"""Sends requests to a port; the seconds of each."""


@dataclass(frozen=True, slots=True)
class Run:
    """The result of some seconds of requests to one service."""

    seconds: float
    times: list[float]
    """Of each request."""
    requests: float
    """Share of them that the busiest worker answered."""
    clients: float
    """Share of them that were its clients in the end."""

    @property
    def rate(self) -> float:
        """Requests a second."""
        return len(self.times) / self.seconds


def in_turn(clients: int, seconds: float, seed: int) -> Ask:
    """Each client asks again as soon as it has its answer."""

    async def ask(port: int) -> list[float]:
        times: list[float] = []
        end = time.perf_counter() + seconds

        async def one(client: int) -> None:
            chance = random.Random(seed * clients + client)
            async with Wire(port) as wire:
                while time.perf_counter() < end:
                    times.append(await _seconds(wire, content(chance), client))

        await asyncio.gather(*[one(client) for client in range(clients)])
        return times

    return ask


def at_random(rate: float, seconds: float, seed: int) -> Ask:
    """Send `rate` requests a second, whether or not earlier ones were answered."""

    async def ask(port: int) -> list[float]:
        chance = random.Random(seed)
        async with Wire(port) as wire, asyncio.TaskGroup() as group:
            tasks: list[asyncio.Task[float]] = []
            start = time.perf_counter()
            due = chance.expovariate(rate)
            while due < seconds:
                await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
                tasks.append(group.create_task(_seconds(wire, content(chance), len(tasks))))
                due += chance.expovariate(rate)
            return [await task for task in tasks]

    return ask


async def _seconds(wire: Wire, body: bytes, client: int) -> float:
    answer = await wire.ask("/v1/rerank", body, head=f"X-Request-Id: {client}\r\n")
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {answer.body!r}")
    return answer.seconds


def measure(service: Service, ask: Ask) -> Run:
    """Send requests, and see in the log who answered them."""
    offset = service.log_path.stat().st_size
    start = time.perf_counter()
    times = asyncio.run(ask(service.port))
    seconds = time.perf_counter() - start
    with service.log_path.open("rb") as log:
        log.seek(offset)
        answered = re.findall(r"^(\d+) POST /v1/rerank 200 .* id=(\d+)", log.read().decode(), re.M)
    requests = Counter(worker for worker, _ in answered)
    clients = Counter({client: worker for worker, client in answered}.values())
    return Run(seconds, times, *(max(counts.values()) / counts.total() for counts in (requests, clients)))


async def looking(workers: int) -> float:
    """Seconds of a request that stays where it arrived: a look at the others, counted in and out."""
    kept: Any = SimpleNamespace(get_write_buffer_size=lambda: 0)
    with tempfile.TemporaryDirectory() as folder:
        first, *_ = all_of_them = [Siblings(folder, slot) for slot in range(workers)]
        for siblings in all_of_them:
            siblings.join(lambda: True, lambda first: asyncio.Protocol())

        def request() -> None:
            first.hand_off(kept, b"POST /v1/rerank HTTP/1.1\r\n")
            first.count(1)
            first.count(-1)

        return min(timeit.repeat(request, number=10_000, repeat=5)) / 10_000


def by_turns(services: dict[str, Service], rounds: int, make: Callable[[int], Ask]) -> dict[str, list[Run]]:
    """The runs of each service; the order changes from round to round."""
    runs: dict[str, list[Run]] = {mode: [] for mode in services}
    for i in range(rounds):
        for mode in list(services)[:: -1 if i % 2 else 1]:
            runs[mode].append(measure(services[mode], make(i)))
    return runs


def row(runs: list[Run], shares: list[float], *facts: object) -> list[str]:
    """A line of a table: shares and rates of each run, times of all of them in milliseconds."""
    times = [seconds for run in runs for seconds in run.times]
    return [
        *map(str, facts),
        f"{statistics.median(shares):.0%} / {max(shares):.0%}",
        f"{statistics.median(run.rate for run in runs):.1f} / {min(run.rate for run in runs):.1f}",
        " / ".join(f"{percentile(times, q) * 1e3:.0f}" for q in (50, 95, 99)),
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6, help="of a run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 16, 64])
    a = parser.parse_args()
    turns, moments = [], []
    for workers in a.workers:
        with ExitStack() as stack:
            alone = stack.enter_context(serve(APP, **SETTINGS))
            services = {
                mode: stack.enter_context(serve(APP, WORKERS=workers, **SETTINGS, **settings))
                for mode, settings in MODES.items()
            }
            time.sleep(3)  # one worker is ready; the others, too
            for clients in a.clients:
                one = [measure(alone, in_turn(clients // workers, a.seconds, i)).rate for i in range(a.rounds)]
                ideal = workers * statistics.median(one)
                for mode, runs in by_turns(services, a.rounds, partial(in_turn, clients, a.seconds)).items():
                    of_ideal = statistics.median(run.rate for run in runs) / ideal
                    shares = [run.clients for run in runs]
                    turns.append([*row(runs, shares, workers, clients, mode), f"{of_ideal:.0%}"])
            for load in LOADS:
                rate = load * workers * RATE
                for mode, runs in by_turns(services, a.rounds, partial(at_random, rate, 2 * a.seconds)).items():
                    shares = [run.requests for run in runs]
                    moments.append(row(runs, shares, workers, f"{load:.0%}", mode))
    print(header(), end="\n\n")
    print(f"Each worker's device scores {RATE:g} requests a second, {AT_ONCE} in a pass of {PASS_SECONDS:g} s of which")
    print(f"{OVERHEAD:g} s do not depend on them; {a.rounds} rounds.\n")
    busiest = "of the busiest worker, median / worst"
    figures = ["requests/s, median / worst", "ms, p50 / p95 / p99"]
    print(
        f"Clients that ask in turn, {a.seconds:g} s. Ideal: one worker with its part of the clients, so many times.\n"
    )
    print(table(["workers", "clients", "", f"clients {busiest}", *figures, "of the ideal"], turns))
    print(f"\nRequests at random over one pool of connections, {2 * a.seconds:g} s:\n")
    print(table(["workers", "load", "", f"requests {busiest}", *figures], moments), end="\n\n")
    costs = [f"{asyncio.run(looking(workers)) * 1e6:.1f} us with {workers}" for workers in (1, 2, 8)]
    print(f"What a request that stays where it arrived costs: {', '.join(costs)} worker(s).")


if __name__ == "__main__":
    main()
