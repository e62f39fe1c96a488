"""Which GPU should a request go to? A discrete-event simulation of routing policies at 1,000 GPUs.

    python -m studies.simulate [--gpus 1000] [--requests 80] [--plot docs/routing.png]

Each GPU is the service's own queue (reranker/scheduler/queue.py, the code that serves) and the batcher's rule: a pass
takes pending work up to the token budget; after half of it, one full batch is taken ahead. Only the forward pass is
a model: `overhead + tokens / rate` seconds. studies/replay.py holds the simulation against a real gunicorn.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import simpy

from reranker.scheduler.queue import Job
from studies.arrivals import Arrival, heavy_tailed
from studies.routing import Choose, Loads, at_random, by_prefix, least, round_robin, stale, two_choices
from studies.simulated import Answer, Gpu, Speed

LOADS = (0.5, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of the requests behind the warm-up: seconds from arrival to answer, and their tokens."""

    seconds: np.ndarray[Any, np.dtype[np.float64]]
    tokens: np.ndarray[Any, np.dtype[np.float64]]
    utilisation: float
    """Share of the time in which a GPU computes, mean over all."""
    waiting: float
    """Tokens in a queue as /metrics shows them, in token budgets; mean over GPUs and time."""
    busy: float
    """Seconds of all forward passes together."""
    passes: int
    most: int
    """Tokens of the largest pass of more than one document."""

    def p(self, percent: float, small: bool = False) -> float:
        """A percentile in seconds; `small`: of the half of the requests with fewer tokens."""
        of = self.seconds[self.tokens <= np.median(self.tokens)] if small else self.seconds
        return float(np.percentile(of, percent))


def simulate(
    arrivals: Iterable[Arrival], choose: Choose, gpus: int, speed: Speed, *, warm_up: int = 0, remember: bool = False
) -> Outcome:
    """Send every arrival to the GPU that `choose` names, and wait for all answers.

    Args:
        arrivals: in order of time.
        choose: a policy of routing.py, fresh.
        warm_up: the number of first requests that are not counted.
        remember: a prefix costs nothing where its query was seen before.
    """
    env = simpy.Environment()
    fleet = [Gpu(env, speed, remember) for _ in range(gpus)]
    loads = Loads(gpus)
    seconds: dict[int, float] = {}
    sizes: list[int] = []
    waiting: list[float] = []
    window = [0.0, 0.0, 0.0, 0.0]  # from, busy until then; to, busy until then

    def busy() -> float:
        return sum(gpu.busy for gpu in fleet)

    def send(number: int, arrival: Arrival) -> None:
        where = choose(arrival, loads)

        def resolved() -> None:
            seconds[number] = env.now - arrival.at
            loads.remove(where, arrival)

        loads.add(where, arrival)
        answer = cast("asyncio.Future[None]", Answer(resolved))
        fleet[where].put(Job(arrival.request, answer, queued_at=arrival.at))

    def clients() -> Iterator[simpy.Event]:
        for number, arrival in enumerate(arrivals):
            if number == warm_up:
                window[:2] = [env.now, busy()]
            yield env.timeout(arrival.at - env.now)
            send(number, arrival)
            sizes.append(arrival.tokens)
            if number >= warm_up and number % gpus == 0:
                waiting.append(sum(gpu.queue.tokens for gpu in fleet) / gpus / speed.budget)
        window[2:] = [env.now, busy()]

    env.process(cast("Any", clients()))
    env.run()
    counted = range(warm_up, len(sizes))
    start, before, end, behind = window
    return Outcome(
        np.array([seconds[i] for i in counted]),
        np.array(sizes[warm_up:], dtype=float),
        (behind - before) / max(end - start, 1e-9) / gpus,
        float(np.mean(waiting)) if waiting else 0.0,
        busy(),
        sum(gpu.passes for gpu in fleet),
        max(gpu.most for gpu in fleet),
    )


POLICIES: dict[str, Callable[[], Choose]] = {
    "random": lambda: at_random(1),
    "round robin": round_robin,
    "two choices, fewer requests": lambda: two_choices("requests", 1),
    "two choices, fewer tokens": lambda: two_choices("tokens", 1),
    "fewest requests": lambda: least("requests", 1),
    "fewest tokens": lambda: least("tokens", 1),
    "fewest tokens, figures 1 s old": lambda: stale(least("tokens", 1), 1.0),
    "two choices, fewer tokens, figures 1 s old": lambda: stale(two_choices("tokens", 1), 1.0),
    "by prefix": by_prefix,
    "by prefix, at most 1.25 of the mean": lambda: by_prefix(1.25),
    "by prefix, at most 1.25, ideal cache": lambda: by_prefix(1.25),
}
"""`ideal cache`: as if every GPU kept every prefix it ever saw, at no cost. Nothing survives a batch here; it is the
most that prefix routing could ever win."""


def rate_for(load: float, gpus: int, speed: Speed, seed: int) -> float:
    """Requests a second that bring `load` times the GPUs' capacity in full passes."""
    sample = itertools.islice(heavy_tailed(1.0, seed), 50_000)
    mean = float(np.mean([arrival.tokens for arrival in sample]))
    return load * gpus / (mean / speed.rate + mean / speed.budget * speed.overhead)


def main() -> None:
    """Simulate every policy at every load; print a table and draw the plot."""
    from benchmarks.report import header, table  # imports torch, which the simulation does without

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=80, help="per GPU; a third of them is warm-up")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--plot", type=Path)
    a = parser.parse_args()
    speed = Speed()
    start = time.process_time()
    rows: list[list[str]] = []
    found: dict[str, list[Outcome]] = {name: [] for name in POLICIES}
    for load in LOADS:
        rate = rate_for(load, a.gpus, speed, a.seed)
        for name, make in POLICIES.items():
            total = a.requests * a.gpus
            outcome = simulate(
                itertools.islice(heavy_tailed(rate, a.seed), total),
                make(),
                a.gpus,
                speed,
                warm_up=total // 3,
                remember="ideal cache" in name,
            )
            found[name].append(outcome)
            rows.append(
                [
                    f"{load:.0%}",
                    name,
                    *(f"{1000 * s:,.0f}" for s in (outcome.p(50), outcome.p(99), outcome.p(99, small=True))),
                    f"{outcome.utilisation:.1%}",
                    f"{outcome.waiting:.2f}",
                ]
            )
    print(header(), end="\n\n")
    print(f"{a.gpus} GPUs, {a.requests} requests a GPU and run (a third warm-up); {speed};")
    print(f"{time.process_time() - start:.0f} s of one core.\n")
    print(table(["load", "policy", "p50 ms", "p99 ms", "p99 ms, smaller half", "utilisation", "budgets waiting"], rows))
    if a.plot:
        _plot(found, a.plot)


def _plot(found: dict[str, list[Outcome]], path: Path) -> None:
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, small in zip(figure.subplots(1, 2, sharey=True), (False, True), strict=True):
        axes.set_prop_cycle(color=colormaps["tab20"](range(len(found))))
        for name, outcomes in found.items():
            style = "--" if "old" in name else ":" if "prefix" in name else "-"
            axes.semilogy(LOADS, [o.p(99, small) for o in outcomes], style, marker=".", label=name)
        axes.set(xlabel="load", ylabel="p99, seconds", title="the smaller half" if small else "all requests")
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
