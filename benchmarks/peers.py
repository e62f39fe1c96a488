"""The peers, set up as well as they can be for this model, and how they are asked.

Each contestant of `benchmarks.engine` runs in a process of its own, so that its peak memory is its own. vLLM and
sentence-transformers need a chat template that writes the card's prompt; jinja strips one of its last newlines.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.card import INSTRUCTION, PREFIX, SUFFIX, Card
from benchmarks.openmp import OWN, environment
from benchmarks.workloads import Requests

Rerank = Callable[[str, list[str]], list[float]]
"""A query and its documents -> probabilities in document order."""


def _role(name: str, default: str = "") -> str:
    found = f'messages | selectattr("role", "eq", "{name}") | map(attribute="content") | first'
    return "{{ " + found + (f' | default("{default}")' if default else "") + " }}"


CHAT_TEMPLATE = (
    f"{PREFIX}<Instruct>: {_role('system', INSTRUCTION)}\n<Query>: {_role('query')}\n"
    f"<Document>: {_role('document')}{SUFFIX}\n"
)


def ours(path: Path, device: str, dtype: torch.dtype) -> Rerank:
    """This engine."""
    from reranker import Scorer

    return Scorer.load(path, device=device, precision=str(dtype).removeprefix("torch.")).rerank


def card(path: Path, device: str, dtype: torch.dtype, *, batch: int, all_positions: bool = False) -> Rerank:
    """The model card's code; `all_positions` as it is printed there."""
    made = Card(path, device=device, dtype=dtype)

    def rerank(query: str, documents: list[str]) -> list[float]:
        logits = made.logits(query, documents, batch=batch, all_positions=all_positions)
        return [1 / (1 + math.exp(-x)) for x in logits]

    return rerank


def sentence_transformers(path: Path, device: str, dtype: torch.dtype, *, batch: int) -> Rerank:
    """sentence-transformers' CrossEncoder, which sorts pairs by length and pads them."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(
        str(path),
        device=device,
        model_kwargs={"dtype": dtype},
        processor_kwargs={"chat_template": CHAT_TEMPLATE},
        activation_fn=torch.nn.Sigmoid(),
    )

    def rerank(query: str, documents: list[str]) -> list[float]:
        scores = model.predict([(query, d) for d in documents], batch_size=batch, show_progress_bar=False)
        return cast("list[float]", scores.tolist())

    return rerank


CONTESTANTS: dict[str, tuple[Callable[..., Rerank], dict[str, Any]]] = {
    "this engine": (ours, {}),
    "card, 1 pair, last position": (card, {"batch": 1}),
    "card, batch 8, last position": (card, {"batch": 8}),
    "card, batch 32, last position": (card, {"batch": 32}),
    "card as printed, batch 8": (card, {"batch": 8, "all_positions": True}),
    "sentence-transformers, batch 8": (sentence_transformers, {"batch": 8}),
    "sentence-transformers, batch 32": (sentence_transformers, {"batch": 32}),
}


@dataclass
class Round:
    """The time and the scores of one contestant for the whole workload."""

    seconds: float
    processor_seconds: float
    scores: list[list[float]]


@dataclass
class Contestant:
    """A process that scores on command."""

    name: str
    pipe: Connection
    process: Any

    def run(self, work: Requests) -> Round:
        """Score a workload; returns when it is done."""
        self.pipe.send(work)
        return cast("Round", self.pipe.recv())

    def leave(self) -> int:
        """End the process; its peak memory in bytes: resident on a CPU, allocated on a GPU."""
        self.pipe.send(None)
        peak = cast("int", self.pipe.recv())
        self.process.join()
        return peak


def start(name: str, path: Path, device: str, dtype: torch.dtype, threads: int) -> Contestant:
    """A contestant with its model loaded and its first pass behind it."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, name, path, device, dtype, threads), daemon=True)
    with environment(**({} if name == "this engine" else OWN)):
        process.start()
    there.close()
    here.recv()
    return Contestant(name, here, process)


def _serve(pipe: Connection, name: str, path: Path, device: str, dtype: torch.dtype, threads: int) -> None:
    torch.set_num_threads(threads)
    make, options = CONTESTANTS[name]
    rerank = make(path, device, dtype, **options)
    rerank("warm-up", ["a document of a few words"] * 8)
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        start, used = time.perf_counter(), time.process_time()
        scores = [rerank(request["query"], request["documents"]) for request in work]
        pipe.send(Round(time.perf_counter() - start, time.process_time() - used, scores))
    if device == "cpu":
        pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    else:
        pipe.send(torch.cuda.max_memory_allocated())
