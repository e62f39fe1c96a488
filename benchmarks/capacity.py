"""Compute the tables of docs/scale.md: the rate and the cost of a GPU, and the number of GPUs for a workload.

    python -m benchmarks.capacity             prints the tables; tests/benchmarks/test_capacity.py compares the document
    python -m benchmarks.capacity --measure   the engine against bare matrix products on this machine's CPU

Everything follows from the models' shapes, from tokens.json (the token counts of short.json and long.json) and
from the two rates below, which were measured.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

from benchmarks.models import SHAPES
from benchmarks.report import header, table
from benchmarks.workloads import read, workloads

H200 = 788e12
"""FLOP/s of large bfloat16 matrix products on an H200, measured. The service itself has not run on a GPU yet."""
EFFICIENCY = 0.5
"""Share of the matmul rate that the service is assumed to reach on a GPU; to be replaced by a measured one."""
CPU = 74e9
"""FLOP/s that the engine reached on one core (AMD EPYC, AVX2, float32), measured: --measure, in RESULTS.md."""
UTILISATION = 0.7
"""Share of the time in which a GPU computes when p99 must hold: see the simulation in docs/scale.md."""
VOCABULARY = 151_669
MODELS = {"0.6B": "0.6b", "4B": "4b", "8B": "8b"}
BATCH_SECONDS, MAX_BATCH_TOKENS = 0.5, 262_144  # reranker/engine/warmup.py


@dataclass(frozen=True, slots=True)
class Model:
    """A shape of benchmarks/models.py in numbers."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def matrices(self) -> int:
        """Weights of the matrices of one layer."""
        attention = (2 * self.heads + 2 * self.kv_heads) * self.head_dim * self.hidden
        return attention + 3 * self.hidden * self.intermediate

    @property
    def parameters(self) -> int:
        """All of them, as transformers counts."""
        norms = self.layers * (2 * self.hidden + 2 * self.head_dim) + self.hidden
        return self.layers * self.matrices + norms + VOCABULARY * self.hidden * (1 if self.tied else 2)

    @property
    def flop(self) -> float:
        """Per packed token: a product and a sum for every weight. The last layer is counted whole."""
        return 2.0 * self.layers * self.matrices

    def attention_flop(self, keys: float) -> float:
        """FLOP per packed token that attends to `keys` keys: scores and weighted sum."""
        return 4.0 * self.layers * self.heads * self.head_dim * keys

    @property
    def activation_bytes(self) -> int:
        """Per token of a pass, in bfloat16: warmup.py's estimate for a CPU; on a GPU it measures."""
        heads, groups = self.heads * self.head_dim, self.kv_heads * self.head_dim
        before = 2 * self.intermediate + 2 * (heads + 4 * groups)
        after = 3 * self.intermediate + 2 * (heads + groups + 2 * self.head_dim)
        return 2 * (4 * self.hidden + max(before, after))

    def rate(self, flops: float) -> float:
        """Packed tokens a second at this rate of the matrix products."""
        return flops / self.flop

    def budget(self, flops: float) -> int:
        """Tokens of a pass, where memory allows them."""
        return min(MAX_BATCH_TOKENS, int(self.rate(flops) * BATCH_SECONDS))


def models() -> dict[str, Model]:
    """By the names of the checkpoints."""
    return {name: Model(*SHAPES[shape]) for name, shape in MODELS.items()}


def gpu_hours(model: Model, tokens: float, efficiency: float = EFFICIENCY) -> float:
    """GPU hours of an H200 for a million documents of `tokens` packed tokens each."""
    return 1e6 * tokens / model.rate(H200 * efficiency) / UTILISATION / 3600


def tables() -> str:
    """All of them as Markdown."""
    short, long = (workloads()[name] for name in ("short", "long"))
    per_document = {"short": short.tokens / short.count, "long": long.tokens / long.count}
    work = [
        [
            name,
            f"{w.count / len(w.prefixes):.0f}",
            f"{w.prompt_tokens / w.count:.0f}",
            f"{w.tokens / w.count:.0f}",
            f"{1 - w.tokens / w.prompt_tokens:.0%}",
            f"{sum(w.request_bytes) / w.count:.0f}",
            f"{sum(w.answer_bytes) / w.count:.0f}",
        ]
        for name, w in (("short", short), ("long", long))
    ]
    keys = sum(short.prefixes) / len(short.prefixes) + per_document["short"] / 2
    shapes = [
        [
            name,
            f"{m.flop / 1e9:.2f}",
            f"{m.attention_flop(keys) / m.flop:.1%}",
            f"{2 * m.parameters / 1e9:.1f}",
            f"{m.activation_bytes / 1024:.0f}",
            f"{m.budget(H200 * EFFICIENCY):,}",
            f"{(2 * m.parameters + m.budget(H200 * EFFICIENCY) * m.activation_bytes) / 1e9:.0f}",
        ]
        for name, m in models().items()
    ]
    rates = [
        [
            name,
            f"{m.rate(H200):,.0f}",
            *(f"{m.rate(H200 * EFFICIENCY) / per_document[kind]:,.0f}" for kind in ("short", "long")),
            *(f"{gpu_hours(m, per_document[kind]):.2f}" for kind in ("short", "long")),
        ]
        for name, m in models().items()
    ]
    sizes = [_size("laptop, 4 cores like the measured one", "0.6B", 4 * CPU)]
    sizes += [_size(f"{n:,} H200", "4B", n * H200 * EFFICIENCY) for n in (1, 8, 100, 1000)]
    return "\n\n".join(
        [
            table(
                [
                    *("work", "documents a request", "tokens a document, alone", "packed", "saved by sharing"),
                    *("bytes in", "bytes out"),
                ],
                work,
            ),
            table(
                [
                    *("model", "GFLOP a token", "attention on top", "weights, GB", "KiB a token of a pass"),
                    *("token budget", "memory a worker, GB"),
                ],
                shapes,
            ),
            table(
                [
                    *("model", "tokens/s at the matmul rate", "short documents/s", "long documents/s"),
                    *("GPU hours per million short", "per million long"),
                ],
                rates,
            ),
            table(
                [
                    *("machine", "model", "short documents/s", "requests/s of 50", "alone, ms"),
                    *("Mbit/s in", "documents a day, millions"),
                ],
                sizes,
            ),
        ]
    )


def _size(machine: str, name: str, flops: float) -> list[str]:
    """A row of the sizing table, at UTILISATION; `alone`: a request of 50 short documents on one idle device."""
    work = workloads()["short"]
    tokens = work.tokens / work.count
    documents = models()[name].rate(flops) * UTILISATION / tokens
    one = models()[name].rate(min(flops, H200 * EFFICIENCY))
    megabits = documents * 8 * sum(work.request_bytes) / work.count / 1e6
    figures = (documents, documents / 50, 1000 * 50 * tokens / one, megabits, documents * 86_400 / 1e6)
    return [machine, name, *(f"{x:,.0f}" if x >= 100 else f"{x:.2g}" for x in figures)]


def measure(rounds: int = 5) -> None:
    """Measure FLOP/s of the engine and of bare products of the same shapes on one core, in alternation."""
    import torch

    from benchmarks.models import model
    from reranker import Scorer

    torch.set_num_threads(1)
    shape = Model(*SHAPES["mid"])
    scorer = Scorer.load(model("mid"), device="cpu", precision="float32")
    request = read("short", 1)[0]
    tokens = workloads()["short"].prefixes[0] + sum(workloads()["short"].documents[0])
    x = torch.randn(1024, shape.hidden)
    up, down = torch.randn(shape.hidden, shape.intermediate), torch.randn(shape.intermediate, shape.hidden)
    flop = 2 * 2 * 1024 * shape.hidden * shape.intermediate
    engine, bare = [], []
    scorer.rerank(request["query"], request["documents"][:8])
    for _ in range(rounds):
        start = time.process_time()
        scorer.rerank(request["query"], request["documents"])
        engine.append(tokens * shape.flop / (time.process_time() - start))
        start = time.process_time()
        for _ in range(50):
            (x @ up) @ down
        bare.append(50 * flop / (time.process_time() - start))
    print(header(), end="\n\n")
    reached, possible = statistics.median(engine), statistics.median(bare)
    print(f"Model mid (float32), one core, {rounds} rounds by turns, median, by processor seconds:")
    print(f"engine {reached / 1e9:.1f} GFLOP/s, bare matrix products {possible / 1e9:.1f} GFLOP/s: ", end="")
    print(f"{reached / possible:.0%}.")


def main() -> None:
    """Print the tables, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        measure()
    else:
        print(tables())


if __name__ == "__main__":
    main()
