"""An actor of `deploy.ray_batch` against `python -m reranker batch`, side by side in one run: documents per second.

    python -m benchmarks.ray_batch [--shape mid] [--requests 4] [--rounds 2] [--parts 2]

needs deploy/requirements-ray.txt. Both are processes that read the same rows and write their results, with one thread,
the same precision and token budget. They take turns. A rate counts from the first row to the last, without loading the
model; for Ray from the start of an actor's first part to the end of its last, with whatever lies between the parts.
Processor seconds are counted alike: for Ray those of the actor while it was at a part, for the command those of its
process less those of a run on one short row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from benchmarks.models import SHAPES, model
from benchmarks.report import header, table
from reranker.batch.output import PartRecord

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mid")
    parser.add_argument("--requests", type=int, default=4, help="requests of short.json, 50 documents each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", type=int, default=2, help="parts that the rows are cut into")
    a = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    work = json.loads((Path(__file__).parent / "short.json").read_text(encoding="utf-8"))[: a.requests]
    options = ["--model", str(model(a.shape)), *"--device cpu --precision float32 --max-batch-tokens 1024".split()]
    speed: dict[str, list[float]] = {"python -m reranker batch": [], "deploy.ray_batch, 1 actor": []}
    used: dict[str, list[float]] = {name: [] for name in speed}
    command, actor = speed
    parts = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "in.jsonl"
        rows.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in work), encoding="utf-8")
        short = folder / "short.jsonl"
        short.write_text('{"query": "a", "documents": ["b"]}\n', encoding="utf-8")
        _, loading = _command(short, folder / "short", options)
        for i in range(a.rounds):
            said, processor = _command(rows, folder / f"{i}.jsonl", options)
            found = re.search(r"(\d+) documents in ([\d.]+) s", said)
            if found is None:
                raise RuntimeError(f"no rate in: {said}")
            speed[command].append(int(found[1]) / float(found[2]))
            used[command].append(processor - loading)

            size = -(-rows.stat().st_size // a.parts)
            _run("deploy.ray_batch", rows, folder / str(i), "--cpus", "1", "--part-bytes", size, *options)
            records = [PartRecord(**json.loads(path.read_bytes())) for path in (folder / str(i) / "_done").iterdir()]
            speed[actor] += rates(records)
            used[actor].append(sum(record.processor for record in records))
            parts = len(records)
            round_speed = f"{speed[command][-1]:.2f}, {speed[actor][-1]:.2f} documents/s"
            print(f"round {i + 1}: {round_speed}", file=sys.stderr, flush=True)

    rate = {name: statistics.median(found) for name, found in speed.items()}
    print(header(), end="\n\n")
    print(f"Model {a.shape} (random weights, float32), short.json, {a.requests} requests, ", end="")
    print(f"{sum(len(row['documents']) for row in work)} documents, {parts} parts,\n{a.rounds} rounds, median.\n")
    rows_of_table = [
        [name, *(f"{x:.2f}" for x in (rate[name], min(found), max(found))), f"{statistics.median(used[name]):.1f}"]
        for name, found in speed.items()
    ]
    print(table(["contestant", "documents/s", "lowest", "highest", "CPU s of scoring"], rows_of_table))
    ratios = sorted(there / here for here, there in zip(speed[command], speed[actor], strict=True))
    print(
        f"\nAn actor reaches {statistics.median(ratios):.3f} of the command's rate "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f} in a round)."
    )


def rates(records: Iterable[PartRecord]) -> list[float]:
    """Return documents per second of each actor, from the start of its first part to the end of its last."""
    by_actor: dict[str, list[PartRecord]] = defaultdict(list)
    for record in records:
        by_actor[record.actor].append(record)
    return [
        sum(record.documents for record in parts)
        / max(max(record.ended for record in parts) - min(record.started for record in parts), 1e-6)
        for parts in by_actor.values()
    ]


def _command(rows: Path, output: Path, options: list[str]) -> tuple[str, float]:
    """Return the standard error of the command, and the processor seconds of its process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = _run("reranker", "batch", rows, output, *options)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return said, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _run(*args: object) -> str:
    """Return the standard error of a module that runs to its end."""
    done = subprocess.run([sys.executable, "-m", *map(str, args)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{args[0]} failed: {done.stderr}")
    return done.stderr


if __name__ == "__main__":
    main()
