"""The engine against its peers on the same texts, side by side in one run, and against the floor of benchmarks.floor.

    python -m benchmarks.engine [--shape mid] [--workload short] [--requests 2] [--documents N] [--seed 0] [--rounds 3]
                                [--threads 2] [--device cpu] [--precision float32] [--only NAME ...] [--rows FILE]

The contestants take turns inside every round, so that a busy machine slows all of them alike. Peers in environments of
their own (`benchmarks/environments/`) take part where these are installed; `--only OpenVINO` stands for all names that
begin so. Scores are compared with the plain float32 computation, one pair at a time. `--rows` appends what was measured
to a file for `benchmarks.plot`. (The engine does less than the floor in the last layer, where only each document's last
token goes on, and more elsewhere: attention, norms, tokenising.)
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from transformers import AutoTokenizer

from benchmarks.encoder_models import ENCODERS
from benchmarks.floor import Floor, floor
from benchmarks.models import MODELS, model
from benchmarks.peers import CONTESTANTS, Round, available, start
from benchmarks.plot import Row, append
from benchmarks.reference import Reference
from benchmarks.report import fewer_cores, header, table
from benchmarks.workloads import NAMES, Requests, read
from reranker.engine.checkpoint.tokenizer import load_tokenizer
from reranker.engine.families.qwen3 import TEMPLATE
from reranker.engine.prompt import Prompt
from reranker.types import RerankRequest


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=MODELS, default="mid")
    parser.add_argument("--workload", choices=NAMES, default="short")
    parser.add_argument("--requests", type=int, default=2, help="requests of the workload to use")
    parser.add_argument("--documents", type=int, help="documents of each request to use; all")
    parser.add_argument("--seed", type=int, default=0, help="of the workload `drawn`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of: {'; '.join(CONTESTANTS)}; or how they begin")
    parser.add_argument("--rows", type=Path, help="append the measured rows to this file")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    path = model(a.shape)
    work = read(a.workload, a.requests, a.documents, a.seed)
    documents = sum(len(r["documents"]) for r in work)
    packed, pairs = tokens(a.shape, path, work)
    names = [n for n in available(a.shape) if a.device == "cpu" or not n.startswith("OpenVINO")]
    if a.only:
        names = [name for name in names if name.startswith(tuple(a.only))]
    if not names:
        parser.error("no contestant of these names is installed for this shape")
    reference = Reference(path, work)

    contestants = [start(name, a.shape, path, a.device, a.precision, a.threads) for name in names]
    rounds: dict[str, list[Round]] = {name: [] for name in names}
    floors: list[Floor] = []
    for turn in range(a.rounds):
        for contestant in contestants[:: -1 if turn % 2 else 1]:
            rounds[contestant.name].append(contestant.run(work))
        floors.append(floor(a.shape, a.device, getattr(torch, a.precision), packed, a.threads))
    peak = {contestant.name: contestant.leave() for contestant in contestants}
    least = sorted(floors, key=lambda f: f.seconds)[len(floors) // 2]

    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights, {a.precision}), {a.device}, {a.workload}: {len(work)} requests,")
    print(f"{documents} documents, {pairs} tokens as pairs, {packed} packed; {a.rounds} rounds, median.\n")
    rows = []
    for name in names:
        wall = statistics.median(r.seconds for r in rounds[name])
        used = statistics.median(r.processor_seconds for r in rounds[name])
        cores = statistics.median(r.processor_seconds / r.seconds for r in rounds[name])
        share = f"{least.seconds / wall:.0%}"
        row = [name, f"{documents / wall:.2f}", f"{used / documents * 100:.1f}"]
        row += [fewer_cores(cores, a.threads if a.device == "cpu" else 0), share, f"{peak[name] / 2**30:.2f}"]
        rows.append([*row, *_times(rounds[name], rounds[names[0]]), f"{reference.apart(rounds[name][-1].scores):.1e}"])
        if a.rows:
            kind = (a.shape, a.precision, a.workload, 0)
            append(a.rows, Row(*kind, name, documents / wall, used / documents * 100, cores))
    rows.append(["floor", f"{documents / least.seconds:.2f}", f"{least.processor_seconds / documents * 100:.1f}"])
    rows[-1] += ["-", "100%", *4 * ["-"]]
    head = ["contestant", "documents/s", "CPU s / 100 documents", "cores used", "of the floor", "peak GiB"]
    print(table([*head, f"{names[0]}: wall", "CPU s", "apart"], rows))
    print(f"\n{_best(rounds)}\nFloor: {a.threads} times {least.gflops:.0f} GFLOP/s ({least.product}).")
    print(
        f"Apart: largest difference of a probability from float32, one pair at a time, for {reference.count} documents."
    )


def _times(rounds: list[Round], ours: list[Round]) -> list[str]:
    """How many times our wall and processor seconds a contestant needs: medians of the rounds' ratios."""
    wall = statistics.median(r.seconds / o.seconds for r, o in zip(rounds, ours, strict=True))
    used = statistics.median(r.processor_seconds / o.processor_seconds for r, o in zip(rounds, ours, strict=True))
    return [f"{wall:.2f}", f"{used:.2f}"]


def _best(rounds: dict[str, list[Round]]) -> str:
    """One line: every peer at its best setting against the first contestant."""
    first, *others = rounds
    wall = {name: statistics.median(r.seconds for r in of) for name, of in rounds.items()}
    best: dict[str, str] = {}
    for name in sorted(others, key=lambda n: wall[n]):
        best.setdefault(name.partition(",")[0], name)
    ratios = [f"{name} {' and '.join(_times(rounds[name], rounds[first]))}" for name in best.values()]
    return f"Peers at their best, times the wall and CPU seconds of {first}: {'; '.join(ratios) or '-'}."


def tokens(shape: str, path: Path, work: Requests) -> tuple[int, int]:
    """Tokens of a workload: each request's prefix once, and once for each document. An encoder shares nothing."""
    if shape in ENCODERS:
        encode = AutoTokenizer.from_pretrained(str(path))
        pairs = sum(len(encode(r["query"], d, truncation=True).input_ids) for r in work for d in r["documents"])
        return pairs, pairs
    prompt = Prompt(load_tokenizer(path), TEMPLATE)
    encoded = [prompt.encode(RerankRequest(r["query"], r["documents"])) for r in work]
    own = sum(len(d) for e in encoded for d in e.documents)
    return own + sum(len(e.prefix) for e in encoded), own + sum(len(e.prefix) * len(e.documents) for e in encoded)


if __name__ == "__main__":
    main()
