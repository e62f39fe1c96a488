"""Time of a forward pass on this CPU by kind of operation, the gain of a second thread, and how threads should wait.

    python -m studies.breakdown [--shape mid] [--requests 2] [--documents N] [--rounds 3]

torch's profiler around the engine's own pass over requests of short.json, one thread; tokenising and packing beside it.
Then passes of one request of growing size with one thread and with two in alternation: wall time and processor seconds.
Then one request with two threads in two alternating processes, which differ in how an OpenMP thread waits for
another (reranker/engine/__init__.py): alone, and beside a process that keeps one core busy.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from benchmarks.models import SHAPES, model
from benchmarks.openmp import OWN
from benchmarks.report import header, table
from benchmarks.workloads import read
from reranker import Scorer
from reranker.types import EncodedRequest, RerankRequest, Slice

GROUPS = {
    "matrix products": ("mm", "addmm", "_linear_pointwise"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "copies: keys and values, blocks, padding": ("index", "copy_", "cat", "index_select", "fill_", "constant_pad_nd"),
    "norms": ("_fused_rms_norm", "rms_norm", "pow", "mean", "rsqrt", "sum", "div_"),
    "rotary, SwiGLU, residuals": ("silu", "silu_", "mul", "mul_", "add", "add_", "addcmul_", "addcmul", "neg"),
}
"""torch's operations by their role in the decoder; a few have more than one."""
REST = "views, allocation, Python"
SIZES = (64, 256, 1024, 4096)
"""Tokens of a pass."""


def breakdown(scorer: Scorer, slices: list[Slice]) -> tuple[dict[str, float], float]:
    """Seconds by group of one pass in the profiler, and the seconds of the whole."""
    batch = scorer.pack(slices)
    scorer.score(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        begun = time.perf_counter()
        scorer.score(batch)
        whole = time.perf_counter() - begun
    groups = {f"{space}::{name}": g for g, names in GROUPS.items() for name in names for space in ("aten", "mkldnn")}
    seconds: dict[str, float] = defaultdict(float)
    for event in profile.key_averages():
        if event.key in groups:
            seconds[groups[event.key]] += event.self_cpu_time_total / 1e6
    seconds[REST] = whole - sum(seconds.values())
    return seconds, whole


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Wall and processor seconds."""
    start, used = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - used


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--documents", type=int, help="documents of each request; all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # as a process of `waiting`
    a = parser.parse_args()
    torch.set_num_threads(1)
    scorer = Scorer.load(model(a.shape), device="cpu", precision="float32")
    requests = [RerankRequest(r["query"], r["documents"]) for r in read("short", a.requests, a.documents)]
    if a.serve:
        serve(scorer, requests[0])
        return
    encoded = [scorer.encode(request) for request in requests]
    slices = [Slice(e, 0, len(e.documents)) for e in encoded]
    found = [breakdown(scorer, slices) for _ in range(a.rounds)]
    whole = statistics.median(seconds for _, seconds in found)
    beside = {
        "tokenising, in another thread": lambda: [scorer.encode(request) for request in requests],
        "packing, in another thread": lambda: scorer.pack(slices),
    }
    size = sum(part.tokens for part in slices)
    print(f"{header()}\n\nModel {a.shape} (random weights, float32), one thread, a pass of {size} tokens,")
    print(f"{a.rounds} rounds, median: {whole:.2f} s.\n")
    parts = {name: statistics.median(seconds[name] for seconds, _ in found) for name in [*GROUPS, REST]}
    parts |= {name: statistics.median(timed(run)[0] for _ in range(a.rounds)) for name, run in beside.items()}
    rows = [[name, f"{seconds:.3f}", f"{seconds / whole:.1%}"] for name, seconds in parts.items()]
    print(table(["part", "seconds", "of the pass"], rows), end="\n\n")
    head = ["tokens", "one thread, ms", "CPU ms", "two threads, ms", "CPU ms", "faster", "CPU time"]
    print(table(head, [threads(scorer, size, a.rounds) for size in SIZES]), end="\n\n")
    print(table(["threads that wait", "beside", "s", "CPU s"], waiting(a.shape, a.rounds)))


WAITING: dict[str, dict[str, str]] = {"sleep: the engine's choice": {}, "spin a while: OpenMP's own": OWN}


def waiting(shape: str, rounds: int) -> list[list[str]]:
    """Rows of the third table."""
    serve = [sys.executable, "-m", "studies.breakdown", "--shape", shape, "--serve"]
    with ExitStack() as stack:
        asked = {name: stack.enter_context(_process(serve, **env)) for name, env in WAITING.items()}
        rows = []
        for beside in ("nothing", "one busy process"):
            if beside != "nothing":
                stack.enter_context(_process([sys.executable, "-c", "while True: pass"]))
            times: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
            for _ in range(rounds + 1):  # the first is not counted
                for name, process in asked.items():
                    times[name].append(_ask(process))
            for name, taken in times.items():
                wall, used = (statistics.median(t[i] for t in taken[1:]) for i in (0, 1))
                rows.append([name, beside, f"{wall:.2f}", f"{used:.2f}"])
    return rows


@contextmanager
def _process(command: list[str], **env: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is new from its interpreter on, so that it reads `env`; it ends with the context."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | env) as process:
        try:
            yield process
        finally:
            process.kill()


def _ask(process: subprocess.Popen[str]) -> tuple[float, float]:
    """Wall and processor seconds of one request there; a process that failed ends the wait with an empty line."""
    assert process.stdin is not None
    assert process.stdout is not None
    print(file=process.stdin, flush=True)
    wall, used = process.stdout.readline().split()
    return float(wall), float(used)


def serve(scorer: Scorer, request: RerankRequest) -> None:
    """The times of one request, for each line of the standard input."""
    torch.set_num_threads(2)
    for _ in sys.stdin:
        print(*timed(lambda: scorer.rerank(request.query, request.documents)), flush=True)


def threads(scorer: Scorer, size: int, rounds: int) -> list[str]:
    """A row of the second table."""
    tokens = list(range(1000, 1000 + size // 8))
    batch = scorer.pack([Slice(EncodedRequest(tokens, [tokens] * 7), 0, 7)])
    repeat = max(1, SIZES[-1] // 2 // size)
    times: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
    for _ in range(rounds + 1):  # the first is not counted
        for count, taken in times.items():
            torch.set_num_threads(count)
            taken.append(timed(lambda: [scorer.score(batch) for _ in range(repeat)]))
    medians = [[statistics.median(1000 * t[i] / repeat for t in taken[1:]) for i in (0, 1)] for taken in times.values()]
    (wall, used), (wall2, used2) = medians
    shown = [f"{ms:.0f}" for ms in (wall, used, wall2, used2)]
    return [str(batch.tokens), *shown, f"{wall / wall2:.2f}", f"{used2 / used:.2f}"]


if __name__ == "__main__":
    main()
