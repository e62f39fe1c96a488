"""`evaluate`: the options of an evaluation, and its report as a table or JSON."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reranker.cli.options import source
from reranker.errors import FailedError, InputError
from reranker.evaluate import collection
from reranker.evaluate.evaluation import Job, Report, write_files
from reranker.evaluate.evaluation import evaluate as run
from reranker.rows.forms import structured_kind
from reranker.terminal import print_result


def evaluate(args: argparse.Namespace) -> None:
    """Measure the gain and print it; the files come last, so that a full disk does not lose the report."""
    origin = source(args)
    needed = ["ir_measures", *([] if args.run else ["bm25s"]), *(["matplotlib"] if args.plot else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise FailedError(f"{' and '.join(missing)} missing; pip install -r requirements-eval.txt")
    job = _job(args)
    report = run(job, origin)
    value = report.facts | {"measures": {gain.name: gain.summary for gain in report.gains}}
    print_result(value, lambda: _print(report), args.output)
    write_files(job, report)


def _job(args: argparse.Namespace) -> Job:
    if args.run == "":
        raise InputError("--run='' names no file")
    job = Job(
        paths=_paths(args),
        run=args.run,
        kind=args.input_format,
        encoding=args.encoding,
        candidates=args.candidates,
        measures=args.measures,
        instruction=args.instruction,
        per_query=args.per_query,
        plot=args.plot,
        save_run=args.save_run,
    )
    kinds = [structured_kind(path) for path in job.inputs]
    if args.input_format and kinds[0] and kinds[1]:
        raise InputError("--input-format has no effect: the names of corpus and queries tell their forms")
    if args.encoding is not None and set(kinds) == {"parquet"}:
        raise InputError(f"--encoding {args.encoding} has no effect: Parquet is always UTF-8; leave it out")
    return job


def _paths(args: argparse.Namespace) -> collection.Paths:
    parts = (args.corpus, args.queries, args.qrels)
    if args.beir:
        if any(parts):
            raise InputError("give --beir, or --corpus, --queries and --qrels, not both")
        return collection.beir(args.beir, "test" if args.split is None else args.split)
    if args.split is not None:
        raise InputError("--split has no effect: it chooses the qrels of a folder that --beir names")
    if not all(parts):
        raise InputError("no data: give --beir DIR, or --corpus, --queries and --qrels")
    return collection.Paths(*map(Path, parts))


def _print(report: Report) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("measure", "before", "after", "gain", "better", "equal", "worse"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for gain in report.gains:
        row: dict[str, Any] = gain.summary
        colour = "green" if row["gain"] > 0 else "red" if row["gain"] < 0 else "dim"
        means = [f"{row[key]:.4f}" for key in ("before", "after")]
        counts = [str(row[key]) for key in ("better", "equal", "worse")]
        table.add_row(gain.name, *means, f"[{colour}]{row['gain']:+.4f}[/]", *counts)
    console = Console()
    console.print(table)
    console.print(
        "{queries} queries ({without_candidates} without candidates), {documents} documents, first stage "
        "{first_stage}, {seconds} s".format(**report.facts),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
