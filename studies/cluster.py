"""Throughput of N replicas on Ray Serve against one, and the errors that clients see when machines come and go.

A cluster of several nodes on one machine, with HTTP clients from outside. The device's time is real waiting, so that a
few processors can stand for many devices: routing, proxy and batcher are measured, the device is not.

python -m studies.cluster scale --plot studies/cluster.png      in the environment of `make test-ray`
python -m studies.cluster faults
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import Callable

import matplotlib.pyplot as plt

from benchmarks.report import header, table
from tests.conftest import free_port
from tests.ray.cluster import Seen, cluster, load, replicas, run, settled, under_load, waiting

PASS_SECONDS = 0.25
REPLICAS = (1, 2, 4, 8)
CLIENTS = (3, 4)
"""Per replica. One is measured with the most of them; several with each, and at equal p95 the better one counts."""
TOLERANCE = 1.05
"""A p95 of at most this factor times that of one replica counts as equal."""


def scale(seconds: float, plot: str | None) -> tuple[str, list[str]]:
    """Throughput and p95 by the number of replicas, and the promises broken."""
    port = free_port()
    best: dict[int, Seen] = {}
    rows = []
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        cluster(folder, port, 4, 2),
    ):
        for count in REPLICAS:
            run(waiting(PASS_SECONDS), count)
            settled(count)
            for clients in CLIENTS if count > 1 else CLIENTS[-1:]:
                seen = asyncio.run(load(port, clients * count, seconds, warm_up=2))
                if set(seen.kinds) != {"200"}:
                    raise SystemExit(f"not all requests were answered: {seen.kinds}")
                one = best.setdefault(1, seen)
                equal = seen.quantile(0.95) <= TOLERANCE * one.quantile(0.95)
                if equal and seen.rate >= best.setdefault(count, seen).rate:
                    best[count] = seen
                times = seen.rate / one.rate
                numbers = [seen.rate, seen.quantile(0.5), seen.quantile(0.95), times, times / count]
                rows.append(
                    [str(count), str(clients * count), *(f"{x:.2f}" for x in numbers), "yes" if equal else "no"]
                )
    if plot and len(best) == len(REPLICAS):  # else a promise is broken, which is said
        _plot(best, plot)
    head = ["replicas", "clients", "answers/s", "p50 s", "p95 s", "times one", "of N", "p95 as of one"]
    broken = [
        f"{count} replicas reach {best[count].rate / best[1].rate:.2f} times one at equal p95, not 0.9 x {count}"
        if count in best
        else f"{count} replicas do not reach the p95 of one"
        for count in REPLICAS
        if count not in best or best[count].rate < 0.9 * count * best[1].rate
    ]
    return table(head, rows), broken


def faults(seconds: float) -> tuple[str, list[str]]:
    """Client errors while a replica is killed, all are updated, a node is removed; and the broken promises."""
    port = free_port()
    rows, broken = [], []
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        cluster(folder, port, 4, 1) as nodes,
    ):

        def kill() -> None:
            os.kill(replicas(nodes)[0].pid, signal.SIGKILL)

        def update() -> None:
            run(waiting(PASS_SECONDS), 4, {"DEFAULT_INSTRUCTION": "another"})

        def remove() -> None:
            nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)

        run(waiting(PASS_SECONDS), 4)
        events: list[tuple[str, Callable[[], object], set[str]]] = [
            ("nothing", lambda: None, set()),
            ("a replica is killed", kill, {"503 not_ready"}),
            ("rolling update of all", update, set()),
            ("a node is removed", remove, {"503 not_ready"}),
        ]
        for name, event, allowed in events:
            settled(4)
            seen = under_load(port, 16, seconds, event)
            others = {kind: count for kind, count in seen.kinds.items() if kind != "200"}
            if not set(others) <= allowed or others.get("503 not_ready", 0) > 16:
                broken.append(f"while {name}: {others}; allowed, once for each client: {allowed or 'none'}")
            rows.append([name, str(seen.kinds["200"]), str(others or "none"), f"{seen.quantile(0.95):.2f}"])
            rows[-1].append(f"{max(seen.latencies):.2f}")
    return table(["while", "answered", "refused", "p95 s", "slowest s"], rows), broken


def _plot(best: dict[int, Seen], path: str) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    counts = sorted(best)
    left.plot(counts, [best[1].rate * n for n in counts], "--", color="grey", label="N times one")
    left.plot(counts, [best[n].rate for n in counts], "o-", label="measured")
    left.set(xlabel="replicas", ylabel="answers/s", xticks=counts, ylim=0)
    left.legend()
    right.plot(counts, [best[n].quantile(0.95) for n in counts], "o-", label="p95")
    right.plot(counts, [best[n].quantile(0.5) for n in counts], "s-", label="median")
    right.set(xlabel="replicas", ylabel="seconds", xticks=counts, ylim=0)
    right.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Print one part of the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["scale", "faults"])
    parser.add_argument("--seconds", type=float, default=12, help="of load for every row")
    parser.add_argument("--plot", help="scale only: write a picture here")
    arguments = parser.parse_args()
    part = scale(arguments.seconds, arguments.plot) if arguments.part == "scale" else faults(arguments.seconds)
    body, broken = part
    print(f"{header()}\n\n{body}")
    for promise in broken:
        print(f"\nbroken: {promise}")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
