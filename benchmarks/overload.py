"""The service under more load than it can serve: scores, refusals and their latencies.

    python -m benchmarks.overload [--seconds 6] [--hold 60] [--capacity 50] [--plot docs/overload.png]

Requests come at random moments (Poisson), whether or not earlier ones were answered, at 0.25 to 10 times the capacity
of the device; the largest load is held. The device waits instead of computing (benchmarks/sleeping_app.py). Ends with a
line for each promise and exits with 1 when one is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

from benchmarks.launch import serve
from benchmarks.report import header, percentile, table
from benchmarks.sleeping_app import PREFIX
from benchmarks.wire import Answer, Wire

matplotlib.use("Agg")
from matplotlib import pyplot

LOADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0, 7.0, 10.0)
DEADLINE = 2.0
"""Seconds: REQUEST_TIMEOUT."""
DOCUMENTS = (5, 15)
WORDS = 50
TOKENS = PREFIX + sum(DOCUMENTS) // 2 * WORDS
"""Of a request, on average."""
PASS_SECONDS = 0.1
PROBES = ("/health", "/livez")


@dataclass
class Level:
    """The responses at one load."""

    load: float
    seconds: float
    """While requests were sent."""
    answers: list[Answer] = field(default_factory=list)
    good: int = 0
    """Requests that were answered with scores, in time and before the load ended."""
    lost: int = 0
    """Requests without an answer."""
    late: list[float] = field(default_factory=list)
    """Seconds by which each request was sent behind its moment."""
    probes: list[Answer] = field(default_factory=list)
    recovery: float = 0.0
    """Seconds from the end of the load until a fresh request took no longer than usual."""

    def times(self, status: int) -> list[float]:
        """Seconds of the answers with that status."""
        return [answer.seconds for answer in self.answers if answer.status == status]

    @property
    def goodput(self) -> float:
        """Requests a second that were answered with scores in time."""
        return self.good / self.seconds

    @property
    def offered(self) -> float:
        """Requests a second as they were sent."""
        return (len(self.answers) + self.lost) / self.seconds

    @property
    def refused(self) -> float:
        """Refusals a second."""
        return len(self.times(429)) / self.seconds


def content(chance: random.Random) -> bytes:
    """A request of a few documents."""
    documents = ["word" + " word" * (WORDS - 1)] * chance.randint(*DOCUMENTS)
    return json.dumps({"query": "what is a word", "documents": documents}).encode()


async def offer(wire: Wire, load: float, rate: float, seconds: float) -> Level:
    """Send `rate` requests a second for `seconds` and wait for all responses."""
    chance = random.Random(int(load * 100))
    level = Level(load, seconds)
    running: set[asyncio.Task[None]] = set()
    sending = True

    async def one() -> None:
        try:
            answer = await wire.ask("/v1/rerank", content(chance))
            level.answers.append(answer)
            level.good += sending and answer.status == 200 and answer.seconds <= DEADLINE
        except (OSError, EOFError):
            level.lost += 1

    async def probe() -> None:
        while True:
            for path in PROBES:
                level.probes.append(await wire.ask(path))
            await asyncio.sleep(0.05)

    probing = asyncio.create_task(probe())
    start = time.perf_counter()
    due = chance.expovariate(rate)
    while due < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        level.late.append(time.perf_counter() - start - due)
        task = asyncio.create_task(one())
        running.add(task)
        task.add_done_callback(running.discard)
        due += chance.expovariate(rate)
    sending = False
    level.seconds = max(seconds, time.perf_counter() - start)
    level.recovery = await recover(wire)
    await asyncio.gather(*running)
    probing.cancel()
    await asyncio.gather(probing, return_exceptions=True)
    return level


async def recover(wire: Wire) -> float:
    """Seconds until fresh requests are answered as fast as on an idle service: in three forward passes.

    Twenty small ones a second are sent for two seconds: infinity, where the last ones still take longer.
    """
    body = json.dumps({"query": "what is a word", "documents": ["word " * WORDS]}).encode()
    start = time.perf_counter()

    async def one(after: float) -> tuple[float, Answer]:
        await asyncio.sleep(after)
        return time.perf_counter() - start, await wire.ask("/v1/rerank", body)

    answers = await asyncio.gather(*[one(i / 20) for i in range(40)])
    slow = [sent for sent, a in answers if a.status != 200 or a.seconds > 3 * PASS_SECONDS]
    fresh = [sent for sent, _ in answers if not slow or sent > max(slow)]
    return min(fresh, default=math.inf)


async def measure(port: int, capacity: float, seconds: float, hold: float) -> list[Level]:
    """All loads, the smallest first."""
    async with Wire(port) as wire:
        await offer(wire, 1.0, capacity, 2)  # the service learns how fast its device is
        return [await offer(wire, x, x * capacity, hold if x == LOADS[-1] else seconds) for x in LOADS]


def row(level: Level) -> list[str]:
    """A line of the table; times in milliseconds."""
    accepted, refused = level.times(200), level.times(429)
    return [
        f"{level.load:g}",
        f"{level.offered:.0f}",
        f"{level.goodput:.1f}",
        f"{level.refused:.0f}",
        f"{percentile(accepted, 50) * 1e3:.0f} / {percentile(accepted, 99) * 1e3:.0f}",
        f"{percentile(refused, 50) * 1e3:.1f} / {percentile(refused, 99) * 1e3:.1f}" if refused else "",
        f"{percentile([p.seconds for p in level.probes], 99) * 1e3:.1f}",
        f"{level.recovery:.2f}",
        f"{percentile(level.late, 99) * 1e3:.1f}",
    ]


HEAD = [
    "load",
    "offered/s",
    "goodput/s",
    "refused/s",
    "scores, ms, p50 / p99",
    "429, ms, p50 / p99",
    "probes, ms, p99",
    "recovered, s",
    "generator late, ms, p99",
]


def promises(levels: Sequence[Level]) -> list[tuple[str, bool]]:
    """Each promise with its figure, and whether it was kept."""
    peak, last = max(level.goodput for level in levels), levels[-1]
    statuses = Counter(answer.status for level in levels for answer in level.answers)
    refused = [answer for level in levels for answer in level.answers if answer.status == 429]
    probes = [probe.seconds for probe in last.probes]
    shed = percentile(last.times(429), 50)
    share = last.goodput / peak
    lost = sum(level.lost for level in levels)
    return [
        (f"goodput at {last.load:g} times capacity, for {last.seconds:.0f} s: {share:.1%} of its peak", share >= 0.9),
        (f"refused there in {shed * 1e3:.1f} ms at the median", shed < 0.05),
        (
            f"{len(refused)} refusals, each with Retry-After",
            all(int(answer.headers.get("retry-after", 0)) >= 1 for answer in refused),
        ),
        (
            f"/health and /livez there: {percentile(probes, 99) * 1e3:.1f} ms at the 99th percentile, "
            f"{max(probes) * 1e3:.1f} ms at most",
            percentile(probes, 99) < 0.1 and {probe.status for probe in last.probes} == {200},
        ),
        (f"recovered after {last.recovery:.2f} s", last.recovery < 1),
        (f"statuses {dict(sorted(statuses.items()))}, lost {lost}", set(statuses) <= {200, 429} and not lost),
    ]


def draw(levels: Sequence[Level], capacity: float, path: Path) -> None:
    """Goodput and refusals above, times below, against the offered load."""
    x = [level.load for level in levels]
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 7), sharex=True)
    above.plot(x, [level.goodput for level in levels], "o-", label="answered with scores in time")
    above.plot(x, [level.refused for level in levels], "s--", label="refused with 429")
    above.axhline(capacity, color="grey", linewidth=0.8, label="capacity of the device")
    above.set(ylabel="requests/s", title="Goodput and refusals against offered load")
    for name, status, q in (("scores, p50", 200, 50), ("scores, p99", 200, 99), ("429, p50", 429, 50)):
        pairs = [(level.load, percentile(level.times(status), q)) for level in levels if level.times(status)]
        below.plot([load for load, _ in pairs], [seconds * 1e3 for _, seconds in pairs], "o-", label=name)
    probes = [percentile([p.seconds for p in level.probes], 99) * 1e3 for level in levels]
    below.plot(x, probes, "o-", label="/health and /livez, p99")
    below.set(xlabel="offered load, in multiples of capacity", ylabel="milliseconds", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=6, help="of every load but the largest")
    parser.add_argument("--hold", type=float, default=60, help="seconds of the largest load")
    parser.add_argument("--capacity", type=float, default=50, help="requests a second that the device can score")
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    rate = a.capacity * TOKENS
    settings = {"RATE": rate, "BATCH_TOKENS": int(rate * PASS_SECONDS), "REQUEST_TIMEOUT": DEADLINE}
    with serve("benchmarks.sleeping_app:app", **settings) as service:
        levels = asyncio.run(measure(service.port, a.capacity, a.seconds, a.hold))
    kept = promises(levels)
    print(header(), end="\n\n")
    print(f"A device that scores {rate:.0f} tokens/s in passes of {PASS_SECONDS:g} s; requests of {DOCUMENTS[0]} to")
    print(
        f"{DOCUMENTS[1]} documents, {TOKENS} tokens on average: {a.capacity:g} a second. REQUEST_TIMEOUT={DEADLINE:g},"
    )
    print(f"one worker; service and load generator share the machine. {a.seconds:g} s a load.\n")
    print(table(HEAD, list(map(row, levels))), end="\n\n")
    for text, good in kept:
        print(f"- {'kept' if good else 'BROKEN'}: {text}")
    if a.plot:
        draw(levels, a.capacity, a.plot)
    sys.exit(not all(good for _, good in kept))


if __name__ == "__main__":
    main()
