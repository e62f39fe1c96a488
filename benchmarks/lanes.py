"""One pass per core against one pass with all cores, in alternation; and an estimate of lanes on more cores.

    python -m benchmarks.lanes [--shape mid] [--workload short] [--requests 2] [--documents 50] [--rounds 5]
                               [--lanes 1 2 4 8 16]

The first table is measured with the real model: the same requests in passes of the same budget. In the second, every
lane computes next to nothing: its model has as many layers and calls and a width of 16, so that Python and torch's
dispatch are what they are, and it sleeps in its products for as long as the real pass takes a core here. The loss
against an equal share is then the GIL's: it says how many lanes are worth having where there are as many cores.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models import SHAPES, RandomWeights, model
from benchmarks.report import header, table
from benchmarks.workloads import read
from reranker.engine.batch import PackedBatch
from reranker.engine.budget import split
from reranker.engine.families.base import Head
from reranker.engine.families.decoder import Decoder
from reranker.engine.families.loader import Loader
from reranker.engine.lanes import DealtBatch, Lanes
from reranker.engine.model import Model
from reranker.engine.scorer import Scorer
from reranker.types import RerankRequest, Slice


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--workload", default="short", help="short or long")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--documents", type=int, help="documents of each request to use; all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 2, 4, 8, 16], help="of the second table")
    a = parser.parse_args()
    scorer = Scorer.load(model(a.shape), device="cpu", precision="float32", max_batch_tokens=8192)
    parts: list[Slice] = []
    for row in read(a.workload, a.requests, a.documents):
        encoded = scorer.encode(RerankRequest(row["query"], row["documents"]))
        parts += split(encoded, scorer.max_batch_tokens, 1 << 30)
    documents = sum(part.stop - part.start for part in parts)
    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights, float32), {a.workload}.json: {documents} documents, {len(parts)} passes;")
    print(f"{a.rounds} rounds, median.\n")
    _real(scorer, parts, documents, a.rounds)
    print()
    _asleep(scorer, parts[0], a.lanes)


def _real(scorer: Scorer, parts: list[Slice], documents: int, rounds: int) -> None:
    cores = torch.get_num_threads()
    ways: dict[str, Lanes | None] = {f"one pass, {cores} cores": None}
    ways |= {f"{count} lanes": Lanes(count, cores) for count in (2**i for i in range(1, cores.bit_length()))}
    wall: dict[str, list[float]] = {name: [] for name in ways}
    used: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, scorer.lanes in ways.items():
            start, processor = time.perf_counter(), time.process_time()
            for part in parts:
                scorer.score(scorer.pack([part]))
            wall[name].append(time.perf_counter() - start)
            used[name].append(time.process_time() - processor)
    plain = statistics.median(next(iter(wall.values())))
    rows = [
        [
            name,
            f"{documents / statistics.median(seconds):.2f}",
            f"{plain / statistics.median(seconds):.2f}",
            f"{statistics.median(a / b for a, b in zip(next(iter(wall.values())), seconds, strict=True)):.2f}",
            f"{statistics.median(used[name]):.2f}",
            f"{statistics.median(u / s for u, s in zip(used[name], seconds, strict=True)):.2f}",
        ]
        for name, seconds in wall.items()
    ]
    print(table(["", "documents/s", "times one pass", "median of the rounds' ratios", "CPU s", "cores used"], rows))


def _asleep(scorer: Scorer, part: Slice, counts: list[int]) -> None:
    scorer.lanes = None
    torch.set_num_threads(1)
    batch = scorer.pack([part])
    assert isinstance(batch, PackedBatch)
    scorer.score(batch)
    start = time.perf_counter()
    scorer.score(batch)
    seconds = time.perf_counter() - start
    thin = _thin(scorer.model)
    thin.hidden(batch)
    used = time.process_time()
    thin.hidden(batch)
    dispatch = time.process_time() - used
    linears = [module for module in _decoder(thin).modules() if isinstance(module, nn.Linear)]
    products: list[None] = []  # a layer computes in blocks of tokens, with a product for each
    hooks = [module.register_forward_hook(lambda *_: products.append(None)) for module in linears]
    thin.hidden(batch)
    for hook in hooks:
        hook.remove()
    for module in linears:
        _sleeping(module, max(0.0, seconds - dispatch) / len(products))

    def forward(lane: PackedBatch) -> Tensor:
        thin.hidden(lane)
        return torch.zeros(lane.shape.documents)

    rows, alone = [], 0.0
    for count in counts:
        lanes = Lanes(count, count)
        dealt = (batch,) * count  # each lane has a pass of this size: as much work for each core, however many
        places = tuple(tuple(range(i * batch.shape.documents, (i + 1) * batch.shape.documents)) for i in range(count))
        taken = []
        for _ in range(3):
            start, used = time.perf_counter(), time.process_time()
            lanes.run(forward, DealtBatch((), dealt, places))
            taken.append((time.perf_counter() - start, time.process_time() - used))
        lanes.close()
        wall, processor = min(taken)
        alone = alone or wall
        rows.append([str(count), f"{wall:.3f}", f"{alone / wall:.0%}", f"{processor:.3f}"])
    print(
        f"A pass of {batch.tokens} tokens takes a core {seconds:.3f} s; Python and dispatch {dispatch:.3f} s of it.\n"
    )
    print(table(["lanes, a pass each", "seconds", "of an equal share", "CPU s (not slept)"], rows))


def _thin(whole: Model) -> Model:
    """The same layers and calls with almost no arithmetic: the rest of a pass is Python and torch's dispatch."""
    config = copy.deepcopy(_decoder(whole).config)
    config.hidden_size, config.intermediate_size, config.head_dim = 16, 16, 8
    config.num_attention_heads, config.num_key_value_heads = 2, 1
    weights = RandomWeights(config, whole.device, whole.dtype)
    backbone = Decoder(Loader(weights, whole.device, whole.dtype, whole.dtype), config)
    thin = Model(backbone, Head(torch.zeros(16)), whole.device, whole.dtype, whole.kernel)
    thin.cache_prefix(list(whole.static_prefix))
    return thin


def _decoder(model: Model) -> Any:
    assert isinstance(model.backbone, Decoder)
    return model.backbone.decoder


def _sleeping(module: nn.Linear, seconds: float) -> None:
    compute = module.forward

    def forward(x: Tensor) -> Tensor:
        time.sleep(seconds)
        return compute(x)

    module.forward = forward  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    main()
