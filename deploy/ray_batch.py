"""Rank rows on many GPUs: `python -m reranker batch` over a Ray cluster. Run again after an interruption, it goes on.

    python -m deploy.ray_batch INPUT... OUTPUT [--actors 8] [--model Qwen/Qwen3-Reranker-0.6B]

INPUT    Parquet or JSON lines: files, folders or patterns, on the disk or on a store (s3://bucket/folder). Rows are
         {"query", "documents", "id"?, "top_k"?, "instruction"?} or {"query", "document", "id"?, "instruction"?}
OUTPUT   a folder, on the disk or on a store; reranker/batch/output.py says what will be in it

The input is cut into parts, and Ray Data hands parts, not rows, to a pool of actors: its own readers would lose the
number of a line, fail a file for one bad row, and cut elsewhere on another cluster.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import logging
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from reranker.cli.main import Parser, count, run
from reranker.cli.options import add_model_options, load_env_file, source
from reranker.errors import FailedError, InputError
from reranker.rankers.source import Source

if TYPE_CHECKING:
    from reranker.batch.output import Record
    from reranker.batch.parts import Part, Scan

_PART_BYTES = 4 << 20


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    top = Parser(prog="python -m deploy.ray_batch", description="Rank rows on the GPUs of a Ray cluster.")
    top.add_argument("input", nargs="+", metavar="INPUT", help="Parquet or JSONL: files, folders, patterns, any store")
    top.add_argument("output", metavar="OUTPUT", help="a folder; run again with the same to continue")
    top.add_argument("--top-k", type=count, metavar="N", help="only the best N, where a row does not say")
    top.add_argument("--overwrite", action="store_true", help="forget what an earlier batch left in OUTPUT")
    top.add_argument(
        "--part-bytes",
        type=count,
        default=_PART_BYTES,
        metavar="N",
        help=f"about so many bytes of rows are written, or lost by a death, together (default: {_PART_BYTES})",
    )
    ray = top.add_argument_group("Ray")
    ray.add_argument("--address", help="a cluster, such as auto or host:6379; default: RAY_ADDRESS, else local")
    ray.add_argument("--actors", type=_pool, metavar="N|MIN,MAX", help="models in memory; default: one per GPU, else 1")
    ray.add_argument(
        "--gpus", type=_share, metavar="N", help="GPUs of an actor; default: 1 where there are any, else 0"
    )
    ray.add_argument(
        "--cpus", type=count, metavar="N", help="CPUs of an actor; default: 1 beside a GPU, else its share"
    )
    add_model_options(top, service=False)
    return top


def _pool(text: str) -> tuple[int, int]:
    least, _, most = text.partition(",")
    pool = count(least), count(most or least)
    if pool[0] > pool[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: the first number must not be above the second")
    return pool


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share < 1_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of GPUs")
    return share


def main(argv: list[str] | None = None) -> None:
    """Run a batch, or what is left of it.

    Raises:
        InputError: arguments, input or output cannot be used.
        FailedError: scoring failed; what is finished is kept.
    """
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.verbose else logging.WARNING)
    missing = [name for name in ("ray", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise FailedError(f"{' and '.join(missing)} missing; pip install -r deploy/requirements-ray.txt")
    for warning in load_env_file():
        _say(f"warning: {warning}")
    where = source(args)
    from reranker.batch import cluster

    files = _files(args.input, args.output)
    with cluster.connected(args.address, verbose=args.verbose):
        _run(args, where, cluster.scan(files, args.part_bytes))


def _files(given: list[str], output: str) -> list[str]:
    """Addresses of the input's files, each once."""
    from reranker.batch import parts, store

    found = sorted({address for one in given for address in store.find(one, parts.ENDINGS)})
    for address in found:
        if not address.endswith(parts.ENDINGS):
            raise InputError(f"{address} ends with none of {', '.join(parts.ENDINGS)}: its name must tell its format")
    if any(store.inside(output, one) for one in given) or any(store.inside(address, output) for address in found):
        raise InputError(f"{output} lies in the input, or the input in it: name another folder")
    return found


def _run(args: argparse.Namespace, where: Source, scans: dict[str, Scan]) -> None:
    from reranker.batch import cluster
    from reranker.batch.actor import Job
    from reranker.batch.output import Output
    from reranker.batch.parts import cut

    parts = cut(scans)
    output = Output(args.output)
    begun = output.begin(_identity(args, where, parts, scans), parts, overwrite=args.overwrite)
    left = [part for part in parts if part.number not in begun]
    _say(f"{len(scans)} files, {len(parts)} parts" + (f", {len(begun)} of them finished before" if begun else ""))
    job = Job(
        where.model.resolved(),
        output,
        args.top_k,
        args.instruction,
        next((record.weights for record in begun.values()), None),
    )
    start = time.monotonic()
    done: list[Record] = []
    for record in cluster.score(left, job, args.actors, args.gpus, args.cpus) if left else ():
        done.append(record)
        if record.weights != done[0].weights:  # as long as it is not too late
            raise FailedError(
                f"the nodes hold different models as {where.model.model_name_or_path}: make them the same, --overwrite"
            )
    seconds = time.monotonic() - start
    total = _totals([*begun.values(), *done])
    output.close(total)
    _sum_up(done, seconds, total, args.output)
    if total["rows"] and total["bad"] == total["rows"]:
        raise InputError(f"not one of {total['rows']} rows could be used; {args.output}/bad-*.jsonl say why")


def _identity(args: argparse.Namespace, where: Source, parts: list[Part], scans: dict[str, Scan]) -> dict[str, Any]:
    """What the results depend on."""
    files = sorted({(part.file, scans[part.address].digest) for part in parts})
    return {
        "input": hashlib.sha256(json.dumps(files).encode()).hexdigest(),
        "--part-bytes": args.part_bytes,
        "top_k": args.top_k,
        "instruction of requests": args.instruction,
    } | where.identity


def _totals(records: Iterable[Record]) -> dict[str, Any]:
    found = list(records)
    return {"parts": len(found)} | {
        name: sum(getattr(record, name) for record in found) for name in ("rows", "bad", "documents", "truncated")
    }


def rates(records: Iterable[Record]) -> list[float]:
    """Documents per second of each actor, from the start of its first part to the end of its last."""
    actors: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        actors[record.actor].append(record)
    return [
        sum(record.documents for record in its)
        / max(max(record.ended for record in its) - min(record.started for record in its), 1e-6)
        for its in actors.values()
    ]


def _sum_up(done: list[Record], seconds: float, total: dict[str, Any], output: str) -> None:
    if not done:
        _say("nothing to do: every part is finished")
    else:
        now, speeds = _totals(done), rates(done)
        _say(
            f"{now['rows']} rows ({now['bad']} bad), {now['documents']} documents in {seconds:.1f} s; {len(speeds)} "
            f"actors, {statistics.median(speeds):,.1f} documents/s each ({min(speeds):,.1f} to {max(speeds):,.1f})"
        )
    _say(f"{output}: {total['rows']} rows, {total['bad']} of them bad, {total['documents']} documents")
    if total["bad"]:
        _say(f"{output}/bad-*.jsonl say which rows are bad, and why")
    if total["truncated"]:
        _say(f"{total['truncated']} documents did not fit and were cut (--max-seq-length)")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run(main)
