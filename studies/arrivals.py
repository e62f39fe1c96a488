"""Arrivals of a simulated service: sizes and moments only. The same seed gives every policy the same requests."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np

from benchmarks.workloads import MAX_TOKENS, workloads
from reranker.types import EncodedRequest

MAX_DOCUMENTS = 2048
"""Documents of a request: the default of the setting."""
_QUERIES = 1_000_000
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and its time of arrival, in seconds from the start."""

    at: float
    query: int
    request: EncodedRequest
    tokens: int


def heavy_tailed(rate: float, seed: int, *, median: float = 30, sigma: float = 1.5) -> Iterator[Arrival]:
    """Poisson arrivals without end, `rate` a second.

    Documents a request are lognormal around `median`: with sigma 1.5 one request in a hundred has a thousand. Tokens a
    document are lognormal too, fitted to all documents of both workloads. Queries are Zipf-distributed (0.8).
    """
    rng = np.random.default_rng(seed)
    logs = np.log([n for w in workloads().values() for documents in w.documents for n in documents])
    prefixes = [n for w in workloads().values() for n in w.prefixes]
    popular = np.cumsum(np.arange(1, _QUERIES + 1) ** -0.8)
    popular /= popular[-1]
    now = 0.0
    while True:
        moments = now + np.cumsum(rng.exponential(1 / rate, _CHUNK))
        counts = np.clip(rng.lognormal(np.log(median), sigma, _CHUNK).round(), 1, MAX_DOCUMENTS).astype(int)
        sizes = np.clip(rng.lognormal(logs.mean(), logs.std(), counts.sum()).round(), 10, MAX_TOKENS).astype(int)
        queries = np.searchsorted(popular, rng.random(_CHUNK))
        shared = rng.choice(prefixes, _CHUNK)
        ends = np.cumsum(counts)
        for i, end in enumerate(ends.tolist()):
            mine = sizes[end - counts[i] : end].tolist()
            yield arrival(float(moments[i]), int(queries[i]), int(shared[i]), mine)
        now = float(moments[-1])


def arrival(at: float, query: int, prefix: int, documents: list[int]) -> Arrival:
    """A request of these sizes. The simulation reads lengths only, so a range stands for a list of tokens."""
    lists = cast("list[list[int]]", [_range(n) for n in documents])
    return Arrival(at, query, EncodedRequest([query] * prefix, lists), prefix + sum(documents))


@cache
def _range(n: int) -> range:
    return range(n)
