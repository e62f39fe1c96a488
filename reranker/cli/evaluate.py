"""`evaluate`: the options of an evaluation, and its report as a table, Markdown or JSON."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reranker.cli.options import source
from reranker.errors import FailedError, InputError
from reranker.evaluate import Job, Report, System, beir, write_files
from reranker.evaluate import evaluate as run
from reranker.evaluate.collection import Paths
from reranker.evaluate.comparison import Example
from reranker.rankers.source import Source
from reranker.root import INSTALL_EVAL
from reranker.rows.forms import structured_kind
from reranker.terminal import harmless, print_result, printing

_HEADING = ("measure", "system", "mean", "difference", "95 % interval", "p", "better", "equal", "worse")
_LEFT = ("measure", "system")
_FILE_WIDTH = 200
"""Columns of a table that is no terminal's."""
_MAX_SHOWN = 300
"""Characters of a text in an example."""


def evaluate(args: argparse.Namespace) -> None:
    """Measure the gain and print it; a failure to print does not lose the files, nor one to write them the report."""
    systems = _systems(args)
    has_bm25 = args.run is None and any(system.source for system in systems)
    needed = ["ir_measures", "scipy", *(["bm25s"] if has_bm25 else []), *(["matplotlib"] if args.plot else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise FailedError(f"{' and '.join(missing)} missing: {sys.executable} {INSTALL_EVAL}")
    job = _job(args)
    report = run(job, systems)
    try:
        if args.output == "markdown":
            with printing():
                print("\n".join(_markdown(report)))
        else:
            print_result(report.json(), lambda: _print(report), args.output)
    finally:
        write_files(job, report)


def _systems(args: argparse.Namespace) -> list[System]:
    """Return the saved runs, then every model or service with every instruction.

    With saved runs alone nothing is reranked.
    """
    systems = [System(run=path) for path in args.compare or ()]
    models, urls, instructions = args.model_name_or_path, args.url, args.instruction
    for option, values in {"--model": models, "--url": urls, "--instruction": instructions}.items():
        for value in values or ():
            if values.count(value) > 1:
                raise InputError(f"{option}={value} is given twice")
    if systems and not (models or urls or instructions):
        source(_single(args, None, None))  # refuses a token without a service, and bad values of other options
        return systems
    texts = [text or None for text in instructions or [None]]
    sources: list[Source] = [source(_single(args, name, url)) for name in models or [None] for url in urls or [None]]
    return systems + [System(origin, text) for origin in sources for text in texts]


def _single(args: argparse.Namespace, model: str | None, url: str | None) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), "model_name_or_path": model, "url": url})


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
        data=f"{Path(args.beir).resolve().name}/{args.split or 'test'}" if args.beir else "",
        examples=args.examples,
        per_query=args.per_query,
        plot=args.plot,
        save_run=args.save_run,
        overwrite=args.overwrite,
    )
    kinds = [structured_kind(path) for path in job.inputs]
    if args.input_format and kinds[0] and kinds[1]:
        raise InputError("--input-format has no effect: the names of corpus and queries tell their forms")
    if args.encoding is not None and set(kinds) == {"parquet"}:
        raise InputError(f"--encoding {args.encoding} has no effect: Parquet is always UTF-8; leave it out")
    return job


def _paths(args: argparse.Namespace) -> Paths:
    parts = (args.corpus, args.queries, args.qrels)
    if args.beir:
        if any(parts):
            raise InputError("give --beir, or --corpus, --queries and --qrels, not both")
        return beir(args.beir, "test" if args.split is None else args.split)
    if args.split is not None:
        raise InputError("--split has no effect: it chooses the qrels of a folder that --beir names")
    if not all(parts):
        raise InputError("no data: give --beir DIR, or --corpus, --queries and --qrels")
    return Paths(*map(Path, parts))


def _rows(report: Report) -> Iterator[tuple[str, ...]]:
    """Yield the cells below `_HEADING`; those of the reference end with its mean."""
    for name in report.measures:
        for result in report.results:
            cells = (name, result.name, f"{result.mean(name):.4f}")
            if result.name == report.reference:
                yield (*cells, "reference", "", "", "", "", "")
                continue
            change = report.differences[name, result.name]
            interval = "" if change.low is None else f"[{change.low:+.4f}, {change.high:+.4f}]"
            p = "" if change.p is None else f"{change.p:.4f}"
            counts = (str(change.better), str(change.equal), str(change.worse))
            yield (*cells, f"{change.mean:+.4f}", interval, p, *counts)


def _facts(report: Report) -> Iterator[str]:
    facts = report.facts
    first = ""
    if facts["first_stage"]:
        first = " ({without_candidates} without candidates), {documents} documents, first stage {first_stage}"
    yield ("data {data}: {queries} queries" + first).format(**facts)
    for result in report.results:
        details = [f"instruction: {result.facts['instruction']}"] if result.facts["instruction"] else []
        details += [f"{result.facts['seconds']} s"] if "seconds" in result.facts else []
        if details:
            yield f"{result.name}: {', '.join(details)}"
    yield from report.verdicts


def _markdown(report: Report) -> Iterator[str]:
    yield f"| {' | '.join(_HEADING)} |"
    yield "|" + "|".join("---" if name in _LEFT else "---:" for name in _HEADING) + "|"
    for row in _rows(report):
        yield f"| {' | '.join(map(_cell, row))} |"
    for line in _facts(report):
        yield ""
        yield _cell(line)
    if report.examples:
        yield ""
        yield f"| {report.measures[0]} | query | {_cell(report.reference)}: first document | system: first document |"
        yield "|---:|---|---|---|"
    for example in report.examples:
        query, old, new = (_cell(harmless(text)) for text in _texts(example))
        yield f"| {example.change:+.4f} | {query} | {old} | {_cell(example.system)}: {new} |"


def _cell(text: str) -> str:
    """Return a text that is one cell of a Markdown table, without markup."""
    return "".join(f"\\{c}" if c in "\\`*_[]<>|" else c for c in text)


def _texts(example: Example) -> tuple[str, str, str]:
    """Return the query, and the first document of reference and system, each as id and text."""
    pairs = ((example.query, example.text), example.reference_top, example.top)
    query, old, new = (" ".join(filter(None, (name, text[:_MAX_SHOWN]))) or "(none)" for name, text in pairs)
    return query, old, new


def _print(report: Report) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    for measure, rows in groupby(_rows(report), key=lambda row: row[0]):
        table = Table(box=None, header_style="bold", pad_edge=False)
        table.add_column(measure, overflow="fold", min_width=len(measure))
        for name in _HEADING[2:]:
            table.add_column(name, justify="right", no_wrap=True)
        for _, name, mean, change, *rest in rows:
            colour = "green" if change.startswith("+") else "red" if change.startswith("-") else "dim"
            table.add_row(Text(harmless(name)), mean, Text(change, colour), *map(Text, rest))
        console.print(table)
        console.print()
    for line in _facts(report):
        console.print(harmless(line), markup=False, highlight=False, soft_wrap=True)
    for example in report.examples:
        query, old, new = (harmless(text) for text in _texts(example))
        console.print()
        # One line each: what does not fit is left out, and a bracket in a text is a bracket.
        for line in (
            f"{example.change:+.4f} {report.measures[0]}  query {query}",
            f"  {report.reference}: {old}",
            f"  {example.system}: {new}",
        ):
            console.print(Text(line), no_wrap=True, overflow="ellipsis")
