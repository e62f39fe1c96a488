"""The workloads: short.json, long.json and `drawn`, which a seed draws from short.json; token counts of both files.

    python -m benchmarks.workloads     count tokens and bytes of both files and write tokens.json

tokens.json holds the counts of Qwen3's own tokenizer for both workloads and for `ten_documents`, so that no other
benchmark needs that tokenizer.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from reranker.types import RerankRequest

_HERE = Path(__file__).parent
TOKENS = _HERE / "tokens.json"
MAX_TOKENS = 8192
"""Tokens of a prompt: the default of MAX_SEQ_LENGTH."""

Requests = list[dict[str, Any]]
"""Bodies of POST /v1/rerank: {"query": text, "documents": texts}."""
NAMES = ("short", "long", "drawn")
CHARACTERS = (60, 1500)
"""The length of a drawn document."""


def read(name: str, requests: int | None = None, documents: int | None = None, seed: int = 0) -> Requests:
    """The first `requests` requests of a workload of NAMES, with the first `documents` documents of each.

    `drawn` has 8 requests of 1 to 50 documents unless other limits are given, and is another one with every seed.
    """
    if name == "drawn":
        return drawn(seed, 8 if requests is None else requests, 50 if documents is None else documents)
    rows = json.loads((_HERE / f"{name}.json").read_text(encoding="utf-8"))[:requests]
    return [{"query": row["query"], "documents": row["documents"][:documents]} for row in rows]


def drawn(seed: int, requests: int, documents: int) -> Requests:
    """Requests of 1 to `documents` documents of CHARACTERS, cut out of the texts of short.json; a pure function."""
    source = random.Random(seed)
    words = " ".join(" ".join(row["documents"]) for row in read("short")).split()
    endless = words * 2

    def text(characters: int) -> str:
        at = source.randrange(len(words))
        return " ".join(endless[at : at + characters])[:characters].strip()

    return [
        {
            "query": " ".join(source.choices(words, k=source.randint(3, 12))),
            "documents": [text(source.randint(*CHARACTERS)) for _ in range(source.randint(1, documents))],
        }
        for _ in range(requests)
    ]


@dataclass(frozen=True, slots=True)
class Workload:
    """Token and byte counts of one file."""

    prefixes: list[int]
    documents: list[list[int]]
    """Tokens of each document with its suffix, by request."""
    request_bytes: list[int]
    answer_bytes: list[int]
    """Bytes of the response bodies of POST /v1/rerank, without headers."""

    @property
    def count(self) -> int:
        """Documents in all requests."""
        return sum(map(len, self.documents))

    @property
    def tokens(self) -> int:
        """Packed tokens: each prefix counts once."""
        return sum(self.prefixes) + sum(map(sum, self.documents))

    @property
    def prompt_tokens(self) -> int:
        """Unpacked tokens: each prefix counts once per document."""
        return sum(p * len(d) + sum(d) for p, d in zip(self.prefixes, self.documents, strict=True))


@cache
def workloads() -> dict[str, Workload]:
    """The counts of short.json and long.json, by name."""
    counted = json.loads(TOKENS.read_text())
    return {name: Workload(**counted[name]) for name in ("short", "long")}


def ten_documents() -> RerankRequest:
    """Ten documents of 100 words, taken from the texts of short.json."""
    words = " ".join(" ".join(r["documents"]) for r in read("short")).split()
    return RerankRequest("how to compress files", [" ".join(words[i * 100 : i * 100 + 100]) for i in range(10)])


def main() -> None:
    """Count tokens and bytes of both files, and write tokens.json."""
    from benchmarks.models import tokenizer
    from reranker.engine.checkpoint.tokenizer import load_tokenizer
    from reranker.engine.families.qwen3 import TEMPLATE
    from reranker.engine.prompt import Prompt

    prompt = Prompt(load_tokenizer(tokenizer()), TEMPLATE, max_seq_length=MAX_TOKENS)
    counts: dict[str, Any] = {}
    for name in ("short", "long"):
        work = read(name)
        encoded = [prompt.encode(RerankRequest(r["query"], r["documents"])) for r in work]
        responses = [[{"index": i, "score": 0.123456789} for i in range(len(r["documents"]))] for r in work]
        counts[name] = {
            "prefixes": [len(e.prefix) for e in encoded],
            "documents": [[len(d) for d in e.documents] for e in encoded],
            "request_bytes": [len(json.dumps(r, ensure_ascii=False).encode()) for r in work],
            "answer_bytes": [len(json.dumps(response).encode()) for response in responses],
        }
    ten = prompt.encode(ten_documents())
    counts["static_prefix"] = len(prompt.static_prefix)
    counts["ten"] = {"prefixes": [len(ten.prefix)], "documents": [[len(d) for d in ten.documents]]}
    TOKENS.write_text(json.dumps(counts) + "\n")


if __name__ == "__main__":
    main()
