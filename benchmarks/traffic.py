"""Requests to replay: sizes only, drawn from a seed, so that every contestant gets the same ones at the same moments.

    python -m benchmarks.traffic     counts tokens and bytes of short.json and long.json into tokens.json

tokens.json is what the true tokenizer makes of the two workloads, and of the request of ten documents that gpu.py
times, kept so that nothing else here needs it.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from reranker.types import EncodedRequest, RerankRequest

HERE = Path(__file__).parent
TOKENS = HERE / "tokens.json"
MAX_DOCUMENTS, MAX_TOKENS = 2048, 8192
"""Of one request, and of one document beside its prefix: the defaults of config.py."""
_QUERIES = 1_000_000
_CHUNK = 2048


@dataclass(frozen=True, slots=True)
class Workload:
    """What the tokenizer says of one file."""

    prefixes: list[int]
    documents: list[list[int]]
    """Tokens of each document with its suffix, by request."""
    request_bytes: list[int]
    answer_bytes: list[int]
    """Of the bodies of POST /v1/rerank, without headers."""

    @property
    def count(self) -> int:
        """Documents in all requests."""
        return sum(map(len, self.documents))

    @property
    def tokens(self) -> int:
        """Packed: every prefix once."""
        return sum(self.prefixes) + sum(map(sum, self.documents))

    @property
    def prompt_tokens(self) -> int:
        """The prefix in front of every document."""
        return sum(p * len(d) + sum(d) for p, d in zip(self.prefixes, self.documents, strict=True))


@cache
def workloads() -> dict[str, Workload]:
    """short and long."""
    counted = json.loads(TOKENS.read_text())
    return {name: Workload(**counted[name]) for name in ("short", "long")}


def ten_documents() -> RerankRequest:
    """Ten documents of 100 words, cut from the texts of short.json."""
    work = json.loads((HERE / "short.json").read_text(encoding="utf-8"))
    words = " ".join(" ".join(r["documents"]) for r in work).split()
    return RerankRequest("how to compress files", [" ".join(words[i * 100 : i * 100 + 100]) for i in range(10)])


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and its moment, in seconds from the start."""

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


def from_files(rate: float, seed: int) -> Iterator[Arrival]:
    """Poisson arrivals of the requests of short.json (four of five) and long.json."""
    rng = np.random.default_rng(seed)
    now = 0.0
    for query in itertools.count():
        now += rng.exponential(1 / rate)
        work = workloads()["short" if rng.random() < 0.8 else "long"]
        i = int(rng.integers(len(work.prefixes)))
        yield arrival(now, query, work.prefixes[i], work.documents[i])


def arrival(at: float, query: int, prefix: int, documents: list[int]) -> Arrival:
    """A request of these sizes. Only lengths are ever asked for, so a range stands for a list of tokens."""
    lists = cast("list[list[int]]", [_range(n) for n in documents])
    return Arrival(at, query, EncodedRequest([query] * prefix, lists), prefix + sum(documents))


@cache
def _range(n: int) -> range:
    return range(n)


def main() -> None:
    """Count tokens and bytes of both files."""
    from benchmarks.models import tokenizer
    from reranker.engine.checkpoint.config import load_tokenizer
    from reranker.engine.families.qwen3 import TEMPLATE
    from reranker.engine.prompt import Prompt

    prompt = Prompt(load_tokenizer(tokenizer()), TEMPLATE, max_seq_length=MAX_TOKENS)
    made: dict[str, Any] = {}
    for name in ("short", "long"):
        work = json.loads((HERE / f"{name}.json").read_text(encoding="utf-8"))
        encoded = [prompt.encode(RerankRequest(r["query"], r["documents"])) for r in work]
        answers = [[{"index": i, "score": 0.123456789} for i in range(len(r["documents"]))] for r in work]
        made[name] = {
            "prefixes": [len(e.prefix) for e in encoded],
            "documents": [[len(d) for d in e.documents] for e in encoded],
            "request_bytes": [
                len(json.dumps({"query": r["query"], "documents": r["documents"]}, ensure_ascii=False).encode())
                for r in work
            ],
            "answer_bytes": [len(json.dumps(answer).encode()) for answer in answers],
        }
    ten = prompt.encode(ten_documents())
    made["static_prefix"] = len(prompt.static_prefix)
    made["ten"] = {"prefixes": [len(ten.prefix)], "documents": [[len(d) for d in ten.documents]]}
    TOKENS.write_text(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
