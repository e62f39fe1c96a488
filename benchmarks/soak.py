"""Mixed traffic for minutes, good and bad: does memory stay flat, is every promise kept.

    python -m benchmarks.soak [--minutes 3] [--workers 1] [--plot docs/soak.png]

Every dialect, wrong bodies, clients that leave, bodies that are too large or never come, bursts over the queue, wrong
tokens, the page and the scrapes, all at once against a real gunicorn with the demo model. Exits with 1 when an answer
was not a documented one within the deadline, a known request got other scores than alone, a process was replaced, or
memory grew after the warm-up by more than is allowed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
import psutil

from benchmarks.launch import Service, serve
from benchmarks.report import header, percentile, table
from benchmarks.wire import Answer, Wire

matplotlib.use("Agg")
from matplotlib import pyplot

DEADLINE = 15.0
"""Seconds: REQUEST_TIMEOUT."""
SLACK = 2.0
"""Seconds that an answer may take beyond it on a busy machine, body and way included."""
TOLERANCE = 1e-5
"""Of a probability: passes of other shapes add up in another order."""
SETTINGS = {
    "ACCESS_TOKEN": "soak",
    "REQUEST_TIMEOUT": DEADLINE,
    "BODY_TIMEOUT": 2,
    "MAX_BODY_BYTES": 300_000,
    "MAX_QUEUE_TOKENS": 30_000,
    "LOG_LEVEL": "WARNING",
}
WARM_UP = 0.3
"""Share of the time after which memory is compared."""
WORDS = (
    "compress files gzip archive chess game weather tomorrow storage disk 压缩 文件 今天 天气 很好 linux tool".split()
)

BAD: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"\xff\xfe", 400),
    (b"[" * 20_000, 400),
    (b"[]", 422),
    (b'{"query": "q", "documents": [Infinity]}', 422),
    (b'{"query": " ", "documents": ["a"]}', 422),
    (b'{"query": "q", "documents": [' + b"{}," * 20_000 + b"{}]}", 422),
    (b'{"query": "q", "documents": ["a"], "top_k": -1}', 422),
    (json.dumps({"query": "word " * 9000, "documents": ["a"]}).encode(), 422),
    (b'{"query": "q", "documents": ["' + b"x" * 400_000 + b'"]}', 413),
]
GETS = ("/health", "/livez", "/readyz", "/metrics", "/info", "/v1/models", "/openapi.json", "/docs", "/")


@dataclass(frozen=True, slots=True)
class Sample:
    """Memory at one moment."""

    seconds: float
    master: float
    """MiB resident."""
    workers: float
    """MiB resident, of all together."""


@dataclass
class Record:
    """All that happened."""

    samples: list[Sample] = field(default_factory=list)
    times: list[tuple[float, float]] = field(default_factory=list)
    """(when it was answered, how long it took) of known requests that got scores, in seconds."""
    statuses: Counter[tuple[str, int]] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)
    """Broken promises."""

    def take(self, kind: str, answer: Answer, allowed: set[int]) -> Answer:
        """Count a response and its broken promises."""
        self.statuses[kind, answer.status] += 1
        if answer.status not in allowed:
            self.broken[f"{kind}: status {answer.status}"] += 1
        if answer.seconds > DEADLINE + SLACK:
            self.broken[f"{kind}: answered after {answer.seconds:.0f} s"] += 1
        if answer.status in (429, 503) and int(answer.headers.get("retry-after", 0)) < 1:
            self.broken[f"{kind}: {answer.status} without Retry-After"] += 1
        if answer.status >= 400 and not answer.body.startswith(b'{"detail":'):
            self.broken[f"{kind}: an error of another shape"] += 1
        return answer


def text(chance: random.Random, words: int) -> str:
    """Some words."""
    return " ".join(chance.choices(WORDS, k=words))


def known(count: int) -> list[tuple[str, bytes]]:
    """(path, body) of requests in every dialect."""
    chance = random.Random(1)
    requests = []
    for i in range(count):
        query, documents = text(chance, 4), [text(chance, chance.randint(1, 60)) for _ in range(chance.randint(1, 12))]
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/rerank", {"query": query, "documents": documents}),
            ("/api/v1/rerank", {"query": query, "documents": documents}),
            ("/v2/rerank", {"model": "any", "query": query, "documents": documents, "return_documents": True}),
            ("/rerank", {"query": query, "texts": documents, "raw_scores": False}),
            ("/v1/rerank", {"query": query, "documents": documents, "instruction": "Find the opposite", "top_k": 3}),
            ("/v1/rerank", {"query": query, "documents": [{"text": d} for d in documents], "model": "any"}),
        ]
        path, body = bodies[i % len(bodies)]
        requests.append((path, json.dumps(body).encode()))
    return requests


def scores(answer: Answer) -> dict[int, float]:
    """By document index, of any dialect."""
    content: Any = answer.json()
    rows = content["results"] if isinstance(content, dict) else content
    return {row["index"]: row.get("score", row.get("relevance_score")) for row in rows}


class Traffic:
    """The clients. Each method is one of them, at it again and again."""

    def __init__(self, wire: Wire, stranger: Wire, record: Record) -> None:
        self.wire, self.stranger = wire, stranger
        self.record = record
        self.chance = random.Random(2)
        self.known = known(24)
        self.reference: list[dict[int, float]] = []
        self.start = time.perf_counter()

    async def learn(self) -> None:
        """The scores of known requests, each alone."""
        for path, body in self.known:
            self.reference.append(scores(await self.wire.ask(path, body)))

    async def good(self) -> None:
        """A known request; its scores must be those it got alone."""
        i = self.chance.randrange(len(self.known))
        path, body = self.known[i]
        answer = self.record.take("known", await self.wire.ask(path, body), {200, 429})
        if answer.status == 200:
            self.record.times.append((time.perf_counter() - self.start, answer.seconds))
            got, wanted = scores(answer), self.reference[i]
            if got.keys() != wanted.keys() or max(abs(got[k] - wanted[k]) for k in got) > TOLERANCE:
                self.record.broken["known: other scores than alone"] += 1
        await asyncio.sleep(self.chance.uniform(0, 0.1))

    async def bad(self) -> None:
        """A body that must be refused."""
        body, status = self.chance.choice(BAD)
        self.record.take("bad", await self.wire.ask("/v1/rerank", body), {status, 429})
        await asyncio.sleep(self.chance.uniform(0, 0.1))

    async def odd(self) -> None:
        """Texts that are not nice, each another."""
        documents = [text(self.chance, self.chance.randint(0, 1000)), "<|im_end|>" * 20, "\ud800", ""]
        body = {
            "query": text(self.chance, 3),
            "documents": documents,
            "max_chunks_per_doc": self.chance.choice([None, 4]),
        }
        self.record.take("odd", await self.wire.ask("/v1/rerank", json.dumps(body).encode()), {200, 429})
        await asyncio.sleep(self.chance.uniform(0, 0.5))

    async def leaves(self) -> None:
        """A client that hangs up, in the middle of its body or behind it."""
        path, body = self.chance.choice(self.known)
        await self.wire.leave(path, body, self.chance.uniform(0, 0.1), self.chance.choice([0.3, 0.9, 1.0]))
        await asyncio.sleep(self.chance.uniform(0, 0.2))

    async def slow(self) -> None:
        """A body that does not come."""
        head = "Content-Type: application/json\r\nContent-Length: 100\r\nConnection: close\r\n"
        self.record.take("slow", await self.wire.ask("/v1/rerank", head=head, method="POST"), {408, 429})

    async def burst(self) -> None:
        """More at once than the queue holds."""
        body = {"query": text(self.chance, 4), "documents": [text(self.chance, 30) for _ in range(30)]}
        content = json.dumps(body).encode()
        for answer in await asyncio.gather(*[self.wire.ask("/v1/rerank", content) for _ in range(40)]):
            self.record.take("burst", answer, {200, 429, 504})
        await asyncio.sleep(self.chance.uniform(3, 9))

    async def wrong_token(self) -> None:
        """Nobody."""
        path, body = self.chance.choice(self.known)
        self.record.take("wrong token", await self.stranger.ask(path, body), {401})
        await asyncio.sleep(self.chance.uniform(0, 0.2))

    async def looks(self) -> None:
        """Probes, scrapes, pages and unknown paths."""
        for path in GETS:
            self.record.take("pages", await self.wire.ask(path), {200})
        self.record.take("not there", await self.wire.ask(f"/{self.chance.random()}"), {404})
        await asyncio.sleep(self.chance.uniform(0, 1))

    async def again(self, client: Callable[[], Awaitable[None]], end: float) -> None:
        """Until the end; a connection that breaks is a broken promise."""
        while time.perf_counter() < end:
            try:
                await client()
            except (OSError, EOFError) as error:
                self.record.broken[f"{client.__name__}: no answer ({type(error).__name__})"] += 1


async def watch(service: Service, record: Record, start: float, end: float) -> None:
    """Note the memory of all processes, some hundred times."""
    master = psutil.Process(service.pid)
    workers = master.children()
    while time.perf_counter() < end:
        try:
            held = [process.memory_info().rss / 2**20 for process in (master, *workers)]
        except psutil.NoSuchProcess:
            record.broken["a process ended"] += 1
            return
        record.samples.append(Sample(time.perf_counter() - start, held[0], sum(held[1:])))
        await asyncio.sleep((end - start) / 300)
    if master.children() != workers:
        record.broken["a process was replaced"] += 1


async def soak(service: Service, seconds: float) -> Record:
    """Run all clients for `seconds`."""
    record = Record()
    async with Wire(service.port, "soak") as wire, Wire(service.port, "wrong") as stranger:
        t = Traffic(wire, stranger, record)
        await t.learn()
        t.start = time.perf_counter()
        end = t.start + seconds
        clients = [*[t.good] * 4, *[t.bad] * 2, t.odd, t.leaves, t.slow, t.burst, t.wrong_token, t.looks]
        tasks = [asyncio.create_task(t.again(client, end)) for client in clients]
        await asyncio.gather(watch(service, record, t.start, end), *tasks)
    return record


def growth(record: Record, of: Callable[[Sample], float]) -> float:
    """MiB between the quarter behind the warm-up and the last quarter.

    Compared is the tenth percentile: a pass takes tens of MiB and gives them back, and a leak lifts the floor.
    """
    count = len(record.samples)
    quarter, first = max(1, count // 4), int(count * WARM_UP)
    before, after = record.samples[first : first + quarter], record.samples[-quarter:]
    return percentile(list(map(of, after)), 10) - percentile(list(map(of, before)), 10)


def draw(record: Record, path: Path) -> None:
    """Memory above, times below."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7, 6), sharex=True)
    minutes = [sample.seconds / 60 for sample in record.samples]
    above.plot(minutes, [sample.workers for sample in record.samples], label="workers")
    above.plot(minutes, [sample.master for sample in record.samples], label="master")
    above.set(ylabel="resident, MiB", ylim=(0, None), title="Mixed traffic, good and bad")
    rows = list(parts(record, 40))
    for q in (50, 95, 99):
        below.plot([at / 60 for at, _ in rows], [percentile(times, q) * 1e3 for _, times in rows], label=f"p{q}")
    below.set(xlabel="minutes", ylabel="known requests, ms", yscale="log")
    for axes in (above, below):
        axes.grid(alpha=0.3)
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=90)


def parts(record: Record, count: int) -> list[tuple[float, list[float]]]:
    """(end, times of known requests) of `count` equal parts of the time, without empty parts."""
    length = record.samples[-1].seconds / count
    made = [((i + 1) * length, [s for at, s in record.times if i == int(at / length)]) for i in range(count)]
    return [part for part in made if part[1]]


def main() -> None:
    """Run, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--growth", type=float, default=24, help="MiB that a worker may grow by after the warm-up")
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    with serve("app:app", WORKERS=a.workers, MODEL_DEVICE="cpu", **SETTINGS) as service:
        record = asyncio.run(soak(service, a.minutes * 60))
        warnings = [line for line in service.log_path.read_text().splitlines() if "Traceback" in line]
    if warnings:
        record.broken["tracebacks in the log"] = len(warnings)
    master, workers = (growth(record, of) for of in (lambda s: s.master, lambda s: s.workers))
    for name, grown, most in (("master", master, a.growth), ("workers", workers, a.growth * a.workers)):
        if grown > most:
            record.broken[f"{name} grew by {grown:.1f} MiB, more than {most:g}"] += 1
    print(header(), end="\n\n")
    print(f"The demo model, {a.workers} worker(s), {a.minutes:g} minutes. Memory at the end of each part of the time;")
    print("times of known requests that got scores.\n")
    rows = []
    for at, times in parts(record, 10):
        sample = max((s for s in record.samples if s.seconds <= at + 0.01), key=lambda s: s.seconds)
        held = [f"{at / 60:.1f}", f"{sample.master:.0f}", f"{sample.workers:.0f}", str(len(times))]
        rows.append(held + [f"{percentile(times, q) * 1e3:.0f}" for q in (50, 95, 99)])
    print(table(["minute", "master, MiB", "workers, MiB", "scored", "p50, ms", "p95, ms", "p99, ms"], rows), end="\n\n")
    kinds = sorted({kind for kind, _ in record.statuses})
    told = {kind: {status: n for (k, status), n in sorted(record.statuses.items()) if k == kind} for kind in kinds}
    print("Answers: " + "; ".join(f"{kind} {counts}" for kind, counts in told.items()) + ".\n")
    print(f"After the warm-up ({WARM_UP:.0%} of the time) master {master:+.1f} MiB, workers {workers:+.1f} MiB.\n")
    print("\n".join(f"- BROKEN: {what}, {n} times" for what, n in record.broken.items()) or "No promise was broken.")
    if a.plot:
        draw(record, a.plot)
    sys.exit(bool(record.broken))


if __name__ == "__main__":
    main()
