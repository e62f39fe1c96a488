"""Policies by which a router chooses the GPU for a request; simulate.py compares them, replay.py measures some.

A router sees no queue: it counts requests without a response, or their tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from studies.arrivals import Arrival

Choose = Callable[[Arrival, "Loads"], int]


class Loads:
    """Requests without a response, and their tokens, by GPU."""

    def __init__(self, gpus: int) -> None:
        self.requests = np.zeros(gpus)
        self.tokens = np.zeros(gpus)

    def add(self, gpu: int, arrival: Arrival) -> None:
        """A request went to a GPU."""
        self.requests[gpu] += 1
        self.tokens[gpu] += arrival.tokens

    def remove(self, gpu: int, arrival: Arrival) -> None:
        """It was answered."""
        self.requests[gpu] -= 1
        self.tokens[gpu] -= arrival.tokens


def at_random(seed: int) -> Choose:
    """Any GPU, as DNS and Kubernetes' own Service choose."""
    rng = np.random.default_rng(seed)
    return lambda arrival, loads: int(rng.integers(len(loads.tokens)))


def round_robin() -> Choose:
    """By turns."""
    last = -1

    def choose(arrival: Arrival, loads: Loads) -> int:
        nonlocal last
        last = (last + 1) % len(loads.tokens)
        return last

    return choose


def least(unit: str, seed: int) -> Choose:
    """One at random of those that have the fewest `requests` or `tokens`."""
    rng = np.random.default_rng(seed)

    def choose(arrival: Arrival, loads: Loads) -> int:
        load = getattr(loads, unit)
        equal = np.flatnonzero(load == load.min())
        return int(equal[rng.integers(len(equal))] if len(equal) > 1 else equal[0])

    return choose


def two_choices(unit: str, seed: int) -> Choose:
    """The better of two at random, by `requests` or `tokens`."""
    rng = np.random.default_rng(seed)

    def choose(arrival: Arrival, loads: Loads) -> int:
        load = getattr(loads, unit)
        a, b = rng.integers(len(load), size=2).tolist()
        return int(a if load[a] <= load[b] else b)

    return choose


def by_prefix(bound: float = np.inf) -> Choose:
    """The GPU of the query; the next one while that has more than `bound` times the mean tokens.

    A hash spreads queries more evenly than a consistent hash ring does, so a ring is no better than this.
    """

    def choose(arrival: Arrival, loads: Loads) -> int:
        gpus = len(loads.tokens)
        gpu = (arrival.query * 0x9E3779B97F4A7C15 >> 16) % gpus
        if bound < np.inf:
            most = bound * (loads.tokens.sum() + arrival.tokens) / gpus
            for _ in range(gpus):
                if loads.tokens[gpu] + arrival.tokens <= most or not loads.tokens[gpu]:
                    break
                gpu = (gpu + 1) % gpus
        return gpu

    return choose


def stale(choose: Choose, seconds: float) -> Choose:
    """The same on figures that are read every `seconds`, as from /metrics; in between they stand still."""
    seen: Loads | None = None
    read = -np.inf

    def choose_late(arrival: Arrival, loads: Loads) -> int:
        nonlocal seen, read
        if seen is None or arrival.at - read >= seconds:
            seen, read = Loads(len(loads.tokens)), arrival.at
            seen.requests[:], seen.tokens[:] = loads.requests, loads.tokens
        return choose(arrival, seen)

    return choose_late
