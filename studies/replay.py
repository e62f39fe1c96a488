"""The simulator against a measured run: the same requests at the same moments to both.

    python -m studies.replay [--seconds 40] [--load 0.8]

A real gunicorn a GPU around benchmarks/sleeping_app.py, whose pass time is real waiting; a client routes by the same
code as the simulation. The difference is the part that the simulator leaves out: HTTP, tokenising, packing, the client.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time
from collections.abc import Iterable
from contextlib import ExitStack

import httpx
import numpy as np

from benchmarks.launch import Service, serve
from benchmarks.report import header, table
from benchmarks.sleeping_app import PREFIX
from studies.arrivals import Arrival, arrival
from studies.routing import Choose, Loads, least, round_robin
from studies.simulate import Outcome, simulate
from studies.simulated import Speed

SPEED = Speed(rate=5000, overhead=0.02, budget=2500)


def traffic(rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Poisson arrivals; documents and their tokens lognormal, with a tail that several passes must share."""
    rng = np.random.default_rng(seed)
    moments = np.cumsum(rng.exponential(1 / rate, int(3 * rate * seconds)))
    made = []
    for at in moments[moments < seconds].tolist():
        count = int(np.clip(rng.lognormal(np.log(8), 1.2), 1, 200))
        made.append(arrival(at, 0, PREFIX, np.clip(rng.lognormal(np.log(40), 0.5, count), 1, 400).astype(int).tolist()))
    return made


async def replay(arrivals: list[Arrival], choose: Choose, urls: list[str]) -> Outcome:
    """Send every request at its moment to the address that `choose` names; seconds as the client sees them."""
    loads = Loads(len(urls))
    seconds = [0.0] * len(arrivals)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)

    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:

        async def send(i: int) -> None:
            due = start + arrivals[i].at
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            where = choose(arrivals[i], loads)
            loads.add(where, arrivals[i])
            documents = ["w " * (len(d) - 1) + "w" for d in arrivals[i].request.documents]
            answer = await client.post(f"{urls[where]}/v1/rerank", json={"query": "q", "documents": documents})
            answer.raise_for_status()
            seconds[i] = time.monotonic() - due
            loads.remove(where, arrivals[i])

        for url in urls:  # connections and code are warm before the clock starts
            await client.post(f"{url}/v1/rerank", json={"query": "q", "documents": ["w"] * 20})
        before = [await _busy(client, url) for url in urls]
        start = time.monotonic() + 0.2
        sent = [asyncio.create_task(send(i)) for i in range(len(arrivals))]
        await asyncio.gather(*sent)
        busy = [await _busy(client, url) for url in urls]
    passes = sum(count for _, count in busy) - sum(count for _, count in before)
    used = sum(s for s, _ in busy) - sum(s for s, _ in before)
    sizes = np.array([a.tokens for a in arrivals], dtype=float)
    return Outcome(np.array(seconds), sizes, 0.0, 0.0, used, int(passes), 0)


def _url(service: Service) -> str:
    return f"http://127.0.0.1:{service.port}"


def _until_last(arrivals: list[Arrival], seconds: Iterable[float], busy: float) -> float:
    """Busy seconds as a share of the time until the last answer."""
    return busy / max(a.at + s for a, s in zip(arrivals, seconds, strict=True))


async def _busy(client: httpx.AsyncClient, url: str) -> tuple[float, float]:
    """Seconds and number of forward passes so far; the server has had one at least."""
    answer = (await client.get(f"{url}/metrics")).raise_for_status()
    found = [re.search(rf"^reranker_batch_duration_seconds_{end} (\S+)", answer.text, re.M) for end in ("sum", "count")]
    seconds, count = (float(match[1]) for match in found if match is not None)
    return seconds, count


def main() -> None:
    """Measure, simulate, and print both side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40, help="per run; there are three")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=11)
    a = parser.parse_args()
    mean = float(np.mean([x.tokens for x in traffic(100, 200, a.seed)]))
    alone = mean / SPEED.rate + mean / SPEED.budget * SPEED.overhead
    settings = {"RATE": SPEED.rate, "OVERHEAD": SPEED.overhead, "BATCH_TOKENS": SPEED.budget, "LOG_LEVEL": "WARNING"}
    rows = []
    with ExitStack() as stack:
        urls = [_url(stack.enter_context(serve("benchmarks.sleeping_app:app", **settings))) for _ in range(2)]
        for gpus, policy, make in (
            (1, "-", round_robin),
            (2, "round robin", round_robin),
            (2, "fewest tokens", lambda: least("tokens", 1)),
        ):
            arrivals = traffic(a.load * gpus / alone, a.seconds, a.seed)
            measured = asyncio.run(replay(arrivals, make(), urls[:gpus]))
            simulated = simulate(arrivals, make(), gpus, SPEED)
            apart = np.median(np.abs(measured.seconds - simulated.seconds))
            pairs = [
                (o.p(50), o.p(99), o.seconds.mean(), _until_last(arrivals, o.seconds, o.busy) / gpus)
                for o in (measured, simulated)
            ]
            rows.append([str(gpus), policy, str(len(arrivals))])
            rows[-1] += [f"{m:.3f} / {s:.3f} ({m / s - 1:+.1%})" for m, s in zip(*pairs, strict=True)]
            rows[-1] += [f"{measured.passes} / {simulated.passes}", f"{1000 * apart:.1f}"]
    print(header(), end="\n\n")
    print(f"Load {a.load:.0%}, {a.seconds:g} s of arrivals a run; {SPEED}. Measured / simulated (difference):\n")
    head = ["GPUs", "policy", "requests", "p50 s", "p99 s", "mean s", "utilisation", "passes"]
    print(table([*head, "median difference of a request, ms"], rows))


if __name__ == "__main__":
    main()
