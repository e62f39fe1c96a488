"""Small requests beside clients that send huge ones: how many forward passes does a small one take.

    python -m benchmarks.fairness [--seconds 45] [--clients 16]

Small requests come at random moments (Poisson), first alone, then beside clients that each have a huge request in
progress all the time: of many documents, then of documents that are larger than a whole pass. The device waits instead
of computing (benchmarks/sleeping_app.py). Exits with 1 when the 95th percentile is above three passes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from dataclasses import dataclass, field

from benchmarks.launch import serve
from benchmarks.report import header, percentile, table
from benchmarks.sleeping_app import PREFIX
from benchmarks.wire import Wire

RATE = 27_500
"""Tokens a second."""
PASS_SECONDS = 0.5
"""The engine's target when it chooses its token budget."""
SMALL_A_SECOND = 4.0


@dataclass
class Crowd:
    """The huge requests of one round, and the times of the small ones beside them."""

    name: str
    documents: int
    """Of each huge request; none, where small ones are alone."""
    words: int
    small: list[float] = field(default_factory=list)
    """Seconds of each small request."""
    other: int = 0
    """Small requests that got no scores."""
    huge: int = 0
    """Huge requests that got scores."""

    @property
    def pass_seconds(self) -> float:
        """A full pass, or a pass of one document that is larger."""
        return max(PASS_SECONDS, (PREFIX + self.words) / RATE)


def body(documents: int, words: int) -> bytes:
    """A request of `documents` documents of `words` words each."""
    return json.dumps({"query": "what is a word", "documents": ["word" + " word" * (words - 1)] * documents}).encode()


async def measure(wire: Wire, crowd: Crowd, clients: int, seconds: float) -> None:
    """Send small requests for `seconds`, beside `clients` clients with huge ones."""
    content, small = body(crowd.documents, crowd.words), body(1, 50)

    async def huge() -> None:
        while True:
            crowd.huge += (await wire.ask("/v1/rerank", content)).status == 200

    async def one() -> None:
        answer = await wire.ask("/v1/rerank", small)
        if answer.status == 200:
            crowd.small.append(answer.seconds)
        else:
            crowd.other += 1

    greedy = [asyncio.create_task(huge()) for _ in range(clients if crowd.documents else 0)]
    await asyncio.sleep(3 * PASS_SECONDS)  # until passes are full
    chance, start = random.Random(3), time.perf_counter()
    due, asked = 0.0, []
    while (due := due + chance.expovariate(SMALL_A_SECOND)) < seconds:
        await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
        asked.append(asyncio.create_task(one()))
    await asyncio.gather(*asked)
    for task in greedy:
        task.cancel()
    await asyncio.gather(*greedy, return_exceptions=True)
    await asyncio.sleep(3 * PASS_SECONDS)  # they took their work along


async def rounds(port: int, crowds: list[Crowd], clients: int, seconds: float) -> None:
    """One after the other."""
    async with Wire(port) as wire:
        for crowd in crowds:
            await measure(wire, crowd, clients, seconds)


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=45, help="of each round")
    parser.add_argument("--clients", type=int, default=16)
    a = parser.parse_args()
    crowds = [Crowd("alone", 0, 0), Crowd("many documents", 100, 500), Crowd("huge documents", 4, 16_000)]
    settings = {"RATE": RATE, "BATCH_TOKENS": int(RATE * PASS_SECONDS)}
    with serve("benchmarks.sleeping_app:app", **settings) as service:
        asyncio.run(rounds(service.port, crowds, a.clients, a.seconds))
    print(header(), end="\n\n")
    print(
        f"{SMALL_A_SECOND:g} small requests a second (100 tokens) beside {a.clients} clients that each have a huge one"
    )
    print(f"in progress; {RATE} tokens/s. In forward passes: the time over that of a full pass, or of a pass of one")
    print("document that is larger.\n")
    rows = [
        [
            crowd.name,
            f"{crowd.documents} of {crowd.words}" if crowd.documents else "",
            str(crowd.huge),
            str(len(crowd.small)),
            *(f"{percentile(crowd.small, q) * 1e3:.0f}" for q in (50, 95, 100)),
            *(f"{percentile(crowd.small, q) / crowd.pass_seconds:.2f}" for q in (50, 95, 100)),
        ]
        for crowd in crowds
    ]
    times = [f"{unit}{q}" for unit in ("ms, ", "passes, ") for q in ("p50", "p95", "most")]
    print(table(["beside", "documents of words", "huge scored", "small scored", *times], rows))
    broken = [c.name for c in crowds if c.other or not percentile(c.small, 95) <= 3 * c.pass_seconds]
    print(f"\n{'BROKEN beside: ' + ', '.join(broken) if broken else 'Kept: three passes at the 95th percentile'}.")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
