"""The engine against the model card's code and sentence-transformers, side by side in one run, and against the floor.

    python -m benchmarks.engine [--shape mid] [--workload short] [--requests 2] [--rounds 3] [--threads 1]
                                [--device cpu] [--precision float32] [--only NAME ...]

The contestants take turns inside every round, so that a busy machine slows all of them alike; the ratios come from the
medians over rounds. The floor: the linear layers of all packed tokens at the rate at which this machine multiplies
matrices of just these shapes, measured in the same rounds. (The engine does less than that in the last layer, where
only each document's last token goes on, and more elsewhere: attention, norms, tokenising.)
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.models import SHAPES, model
from benchmarks.peers import CONTESTANTS, Round, start
from benchmarks.report import header, table
from benchmarks.workloads import Requests, read
from reranker.engine.checkpoint.tokenizer import load_tokenizer
from reranker.engine.families.qwen3 import TEMPLATE
from reranker.engine.prompt import Prompt
from reranker.types import RerankRequest


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--workload", default="short", help="short or long")
    parser.add_argument("--requests", type=int, default=2, help="requests of the workload to use")
    parser.add_argument("--documents", type=int, help="documents of each request to use; all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS), metavar="NAME")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    dtype: torch.dtype = getattr(torch, a.precision)
    path = model(a.shape)
    work = read(a.workload, a.requests, a.documents)
    documents = sum(len(r["documents"]) for r in work)
    packed, pairs = _tokens(path, work)

    contestants = [start(name, path, a.device, dtype, a.threads) for name in a.only]
    rounds: dict[str, list[Round]] = {name: [] for name in a.only}
    floors: list[tuple[float, float]] = []
    for _ in range(a.rounds):
        for contestant in contestants:
            rounds[contestant.name].append(contestant.run(work))
        floors.append(_floor(a.shape, a.device, dtype, packed))
    peak = {contestant.name: contestant.leave() for contestant in contestants}

    wall = {name: statistics.median(r.seconds for r in rounds[name]) for name in a.only}
    used = {name: statistics.median(r.processor_seconds for r in rounds[name]) for name in a.only}
    floor, floor_used = statistics.median(f for f, _ in floors), statistics.median(u for _, u in floors)
    ours = a.only[0]
    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights, {a.precision}), {a.device}, {a.workload}.json: {len(work)} requests,")
    print(f"{documents} documents, {pairs} tokens as pairs, {packed} packed; {a.rounds} rounds, median.\n")
    rows = [
        [
            name,
            f"{documents / wall[name]:.2f}",
            f"{used[name]:.2f}",
            f"{pairs / wall[name]:,.0f}",
            f"{floor / wall[name]:.0%}",
            f"{peak[name] / 2**30:.2f}",
            f"{wall[name] / wall[ours]:.2f}",
            f"{used[name] / used[ours]:.2f}",
            f"{_apart(rounds[name][-1].scores, rounds[ours][-1].scores):.1e}",
        ]
        for name in a.only
    ]
    flop = 2 * _layer_weights(a.shape) * packed
    rows.append(["floor", f"{documents / floor:.2f}", f"{floor_used:.2f}", f"{pairs / floor:,.0f}", "100%", *4 * ["-"]])
    head = ["contestant", "documents/s", "CPU s", "pair tokens/s", "of the floor", "peak GiB"]
    print(table([*head, f"{ours}: wall", "CPU s", "largest difference of a probability"], rows))
    print(f"\nMatrix rate {flop / floor / 1e9:,.0f} GFLOP/s; {ours}: {packed / wall[ours]:,.0f} packed tokens/s.")


def _tokens(path: Path, work: Requests) -> tuple[int, int]:
    """Tokens of a workload: each request's prefix once, and once for each document."""
    prompt = Prompt(load_tokenizer(path), TEMPLATE)
    encoded = [prompt.encode(RerankRequest(r["query"], r["documents"])) for r in work]
    own = sum(len(d) for e in encoded for d in e.documents)
    return own + sum(len(e.prefix) for e in encoded), own + sum(len(e.prefix) * len(e.documents) for e in encoded)


def _matrices(shape: str) -> list[tuple[int, int, int]]:
    """(inputs, outputs, how many) of the linear layers in one decoder layer"""
    hidden, intermediate, _, heads, kv_heads, head_dim, _ = SHAPES[shape]
    return [
        (hidden, heads * head_dim, 1),
        (hidden, kv_heads * head_dim, 2),
        (heads * head_dim, hidden, 1),
        (hidden, intermediate, 2),
        (intermediate, hidden, 1),
    ]


def _layer_weights(shape: str) -> int:
    return SHAPES[shape][2] * sum(i * o * n for i, o, n in _matrices(shape))


@torch.inference_mode()
def _floor(shape: str, device: str, dtype: torch.dtype, tokens: int) -> tuple[float, float]:
    """Wall and processor seconds of the linear layers alone for `tokens` tokens.

    One layer is measured, with its own weights and in passes of the size that the engine uses, and multiplied.
    """
    rows, layers = min(tokens, 1024 if device == "cpu" else 16_384), SHAPES[shape][2]
    pairs: list[tuple[Tensor, Tensor]] = []
    for inputs, outputs, count in _matrices(shape):
        x = torch.randn(rows, inputs, device=device, dtype=dtype)
        pairs += [(x, torch.randn(outputs, inputs, device=device, dtype=dtype)) for _ in range(count)]

    def layer() -> None:
        for x, weight in pairs:
            torch.nn.functional.linear(x, weight)

    def synchronise() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    layer()
    synchronise()
    begin, used, times = time.perf_counter(), time.process_time(), 0
    while times < 4 or time.perf_counter() - begin < 1:
        layer()
        times += 1
    synchronise()
    share = tokens / rows * layers / times
    return (time.perf_counter() - begin) * share, (time.process_time() - used) * share


def _apart(left: list[list[float]], right: list[list[float]]) -> float:
    return max(abs(x - y) for a, b in zip(left, right, strict=True) for x, y in zip(a, b, strict=True))


if __name__ == "__main__":
    main()
