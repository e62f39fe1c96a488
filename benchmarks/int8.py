"""int8 against float32 on this processor: speed of the products and of the engine, scores, and ranking of the demo.

    python -m benchmarks.int8 [--shape mid] [--requests 1] [--rounds 2] [--threads 1]
    python -m benchmarks.int8 --errors     the arithmetic of a GPU's int8 and float8, on this processor: errors only

The contestants take turns inside every round. nDCG@10 is of the demo model on its held-out tasks, where one document of
20 is relevant, so that it is 1 / log2(1 + rank), or 0 below rank 10.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from benchmarks.models import SHAPES, model
from benchmarks.report import header, table
from benchmarks.workloads import read
from reranker import Scorer
from reranker.engine.budget import split
from reranker.engine.checkpoint.locate import Located
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.families import open_checkpoint
from reranker.engine.families.loader import Loader, Wrap
from reranker.engine.quantized import Float8Linear, Int8GpuLinear, Int8Linear
from reranker.engine.scorer import DEMO
from reranker.types import RerankRequest

ROOT = Path(__file__).resolve().parents[1]
PRECISIONS = ("float32", "int8")
NARROW: tuple[type[nn.Module], ...] = (Int8GpuLinear, Float8Linear)
CPU = torch.device("cpu")


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--requests", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tasks", type=int, default=1000, help="held-out tasks of each language")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--errors", action="store_true")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    print(header(), end="\n\n")
    if a.errors:
        print(f"{errors()}\n\n{logit_errors(a.tasks)}")
        return
    vnni = "with" if torch.cpu._is_vnni_supported() else "without"
    print(f"Processor {vnni} VNNI (AVX-512). Products, one layer of each shape:\n")
    print(table(["shape", "rows", "float32 GFLOP/s", "int8, times as fast"], products()), end="\n\n")
    print(engine(a.shape, a.requests, a.rounds), end="\n\n")
    print(ranking(a.tasks))


def products() -> list[list[str]]:
    """Each shape's four products at two sizes, quantising included: the shortest of several alternating runs."""
    rows = []
    for shape in ("mid", "0.6b"):
        hidden, intermediate, _, heads, groups, head, _ = SHAPES[shape]
        sizes = [(hidden, (heads + 2 * groups) * head), (heads * head, hidden)]
        sizes += [(hidden, 2 * intermediate), (intermediate, hidden)]
        for tokens in (256, 1024, 2048):
            best = [0.0, 0.0]
            for inputs, outputs in sizes:
                exact = nn.Linear(inputs, outputs, bias=False)
                contestants, x = (exact, Int8Linear(exact)), torch.randn(tokens, inputs)
                times: list[list[float]] = [[], []]
                with torch.inference_mode():
                    for _ in range(6):
                        for run, seconds in zip(contestants, times, strict=True):
                            start = time.perf_counter()
                            run(x)
                            seconds.append(time.perf_counter() - start)
                best = [total + min(seconds) for total, seconds in zip(best, times, strict=True)]
            flop = 2 * tokens * sum(inputs * outputs for inputs, outputs in sizes)
            rows.append([shape, str(tokens), f"{flop / best[0] / 1e9:.0f}", f"{best[0] / best[1]:.2f}"])
    return rows


def engine(shape: str, requests: int, rounds: int) -> str:
    """The whole engine on short.json, and how far the logits are apart."""
    work = read("short", requests)
    path = model(shape)
    scorers = {precision: Scorer.load(path, device="cpu", precision=precision) for precision in PRECISIONS}
    budget = min(scorer.max_batch_tokens for scorer in scorers.values())
    processor: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    wall: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    logits: dict[str, list[float]] = {}
    for _ in range(rounds):
        for precision, scorer in scorers.items():
            encoded = [scorer.encode(RerankRequest(r["query"], r["documents"])) for r in work]
            start, used = time.perf_counter(), time.process_time()
            parts = [part for e in encoded for part in split(e, budget, 10**9)]
            logits[precision] = [logit for part in parts for logit in scorer.score(scorer.pack([part]))]
            wall[precision].append(time.perf_counter() - start)
            processor[precision].append(time.process_time() - used)
    base, fast = (statistics.median(wall[precision]) for precision in PRECISIONS)
    used, needed = (statistics.median(processor[precision]) for precision in PRECISIONS)
    true, got = (torch.tensor(logits[precision]) for precision in PRECISIONS)
    apart = (true - got).abs()
    return (
        f"Engine, {shape} (random weights), {len(true)} documents of short.json, batches of {budget} tokens: int8 is "
        f"{base / fast:.2f} times as fast as float32 (wall; {used / needed:.2f} by CPU seconds, {needed:.1f} against "
        f"{used:.1f}).\nLogits: float32 spreads over {true.max() - true.min():.2f} (standard deviation "
        f"{true.std():.2f}); int8 differs by {apart.mean():.3f} on average and {apart.max():.3f} at most; correlation "
        f"{torch.corrcoef(torch.stack([true, got]))[0, 1]:.4f}."
    )


def ranking(most: int) -> str:
    """nDCG@10 and largest score difference of the demo model on its held-out tasks."""
    heldout = json.loads((ROOT / "demo" / "heldout.json").read_text(encoding="utf-8"))
    scorers = [Scorer.load(device="cpu", precision=precision) for precision in PRECISIONS]
    rows = []
    for language, part in heldout.items():
        gains: list[list[float]] = [[], []]
        apart = 0.0
        for task in part["tasks"][:most]:
            documents = [part["documents"][i] for i in task["documents"]]
            both = [torch.tensor(scorer.rerank(task["query"], documents)) for scorer in scorers]
            apart = max(apart, (both[0] - both[1]).abs().max().item())
            for scores, gain in zip(both, gains, strict=True):
                rank = 1 + int((scores > scores[task["answer"]]).sum())
                gain.append(1 / math.log2(1 + rank) if rank <= 10 else 0.0)
        means = [statistics.mean(gain) for gain in gains]
        figures = (f"{means[0]:.4f}", f"{means[1]:.4f}", f"{means[1] - means[0]:+.4f}", f"{apart:.3f}")
        rows.append([language, str(len(gains[0])), *figures])
    head = ["language", "tasks", "nDCG@10 float32", "nDCG@10 int8", "difference", "largest score difference"]
    return "The demo model on its held-out tasks:\n\n" + table(head, rows)


def errors() -> str:
    """Error of a product as a share of its norm, by the size of the four largest activations of each token."""
    rows = []
    for inputs in (1024, 2560, 9728):
        generator = torch.Generator().manual_seed(0)
        exact = nn.Linear(inputs, 512, bias=False)
        exact.weight.data = torch.randn(512, inputs, generator=generator) * 0.02
        layers = [kind(exact.bfloat16().float()) for kind in NARROW]
        for peak in (0, 10, 20, 30, 100):
            x = torch.randn(64, inputs, generator=generator)
            if peak:
                x[:, :: inputs // 4] = peak
            x, row = x.bfloat16(), [str(inputs), str(peak or "none")]
            true = x.float() @ exact.weight.float().T
            for layer in layers:
                apart = (layer(x).float() - true).norm(dim=-1) / true.norm(dim=-1)
                row.append(f"{apart.mean():.1%}")
            rows.append(row)
    head = ["inputs", "four activations of, standard deviations", "int8", "float8"]
    return "Error of a product, normally distributed numbers but for the largest activations:\n\n" + table(head, rows)


def logit_errors(most: int) -> str:
    """Of the demo on its held-out tasks and of random weights on short.json, between bfloat16 products of 8 bits."""
    heldout = json.loads((ROOT / "demo" / "heldout.json").read_text(encoding="utf-8"))
    tasks = [(task, part["documents"]) for part in heldout.values() for task in part["tasks"][:most]]
    held = [RerankRequest(task["query"], [documents[i] for i in task["documents"]]) for task, documents in tasks]
    short = [RerankRequest(r["query"], r["documents"]) for r in read("short", 2)]
    rows = []
    for name, path, requests in (("demo", DEMO, held), ("mid, random weights", model("mid"), short)):
        reference = Scorer.load(path, device="cpu", precision="float32")
        encoded = [reference.encode(request) for request in requests]
        parts = [part for e in encoded for part in split(e, reference.max_batch_tokens, 10**9)]
        batches = [reference.pack([part]) for part in parts]
        true = torch.tensor([logit for batch in batches for logit in reference.score(batch)])
        family = open_checkpoint(Located(path))
        weights = Weights(path)
        peaks: list[float] = []
        for kind in (None, *NARROW):
            wrap = _wrap(kind, peaks)
            backbone = family.backbone(Loader(weights, CPU, torch.bfloat16, torch.bfloat16, wrap))
            backbone.cache_prefix(reference.prompt.static_prefix, reference.model.kernel)
            reference.model.backbone = backbone
            got = torch.tensor([logit for batch in batches for logit in reference.score(batch)])
            apart = (got - true).abs()
            figures = (f"{apart.mean() / true.std():.3f}", f"{apart.max() / true.std():.2f}")
            correlation = torch.corrcoef(torch.stack([true, got]))[0, 1]
            label = "bfloat16" if kind is None else "int8" if kind is Int8GpuLinear else "float8"
            rows.append([name, label, str(len(true)), *figures, f"{correlation:.5f}"])
        rows[-1].append(f"{statistics.median(peaks):.0f}, {max(peaks):.0f}")
    head = ["model", "precision", "documents", "mean error", "largest", "correlation"]
    rows = [[*row, "", ""][:7] for row in rows]
    return (
        "Logits against float32, in standard deviations of the logits; peak: the largest activation of a token before "
        "a product, in standard deviations of the token, median and maximum:\n\n" + table([*head, "peak"], rows)
    )


def _wrap(kind: type[nn.Module] | None, peaks: list[float]) -> Wrap:
    """Replaces projections, and notes the peaks of what float8's are given."""

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        x = inputs[0].float()
        peaks.extend((x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-20)).tolist())

    def wrap(linear: nn.Linear, names: Sequence[str]) -> nn.Module:
        if kind is None:
            return linear
        layer = kind(linear)
        if kind is Float8Linear:
            layer.register_forward_pre_hook(note)
        return layer

    return wrap


if __name__ == "__main__":
    main()
