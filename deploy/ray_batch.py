"""Rank rows on the GPUs of a Ray cluster. Run again after an interruption, it continues.

    python -m deploy.ray_batch INPUT... OUTPUT [--actors 8] [--model Qwen/Qwen3-Reranker-0.6B]

docs/ray-batch.md describes rows and results; reranker/batch/ does the work.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import sys

from reranker.cli.main import Parser, count, run
from reranker.cli.options import add_model_options, load_env_file, source
from reranker.errors import FailedError
from reranker.rows.row import Defaults


def parser() -> argparse.ArgumentParser:
    """Return the parser of the arguments."""
    top = Parser(prog="python -m deploy.ray_batch", description="Rank rows on the GPUs of a Ray cluster.")
    top.add_argument("input", nargs="+", metavar="INPUT", help="Parquet or JSONL: files, folders, patterns, any store")
    top.add_argument("output", metavar="OUTPUT", help="a folder; run again with the same to continue")
    top.add_argument("--top-k", type=count, metavar="N", help="only the best N, where a row does not say")
    top.add_argument("--overwrite", action="store_true", help="delete an earlier batch in OUTPUT")
    part_help = "approximate bytes of rows that are written, or lost by a death, together (default: %(default)s)"
    top.add_argument("--part-bytes", type=count, default=4 << 20, metavar="N", help=part_help)
    ray = top.add_argument_group("Ray")
    ray.add_argument("--address", help="a cluster, such as auto or host:6379; default: RAY_ADDRESS, else local")
    ray.add_argument("--actors", type=_pool, metavar="N|MIN,MAX", help="models in memory; default: one per GPU, else 1")
    gpus_help = "GPUs of an actor; default: 1 where there are any, else 0"
    ray.add_argument("--gpus", type=_share, metavar="N", help=gpus_help)
    cpus_help = "CPUs of an actor; default: 1 beside a GPU, else its share"
    ray.add_argument("--cpus", type=count, metavar="N", help=cpus_help)
    add_model_options(top, service=False)
    return top


def _pool(text: str) -> tuple[int, int]:
    smallest, _, largest = text.partition(",")
    pool = count(smallest), count(largest or smallest)
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
    """Run a batch, or the rest of an earlier one; see `distributed` for errors."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.verbose else logging.WARNING)
    missing = [name for name in ("ray", "pyarrow") if importlib.util.find_spec(name) is None]
    if missing:
        raise FailedError(f"{' and '.join(missing)} missing; pip install -r deploy/requirements-ray.txt")
    for warning in load_env_file():
        print(f"warning: {warning}", file=sys.stderr, flush=True)
    model, defaults = source(args), Defaults(args.top_k, args.instruction)
    from reranker.batch import cluster, distributed  # ray, pyarrow

    files = distributed.find_files(args.input, args.output)
    pool = cluster.Pool(args.actors, args.gpus, args.cpus)
    with cluster.connected(args.address, verbose=args.verbose):
        distributed.run(files, args.output, model, defaults, pool, args.part_bytes, overwrite=args.overwrite)


if __name__ == "__main__":
    run(main)
