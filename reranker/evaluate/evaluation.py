"""`evaluate`: is it worth it? Ranks the candidates of the user's own judged queries and measures before and after."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from reranker.cli.options import source
from reranker.errors import FailedError, InputError, RerankError
from reranker.evaluate import bm25, collection, gain, judgements
from reranker.evaluate.judgements import Grades, Ranking
from reranker.evaluate.outputs import check_outputs
from reranker.rankers.ranker import Ranker, open_ranker
from reranker.rows.forms import told
from reranker.rows.lines import writing
from reranker.terminal import meter, note, plural, print_json, printing
from reranker.types import RerankRequest


def evaluate(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: the data cannot be read, or does not fit together.
        FailedError: a package is missing, or scoring failed.
    """
    where = source(args)
    _require("ir_measures", *(() if args.run else ("bm25s",)), *(("matplotlib",) if args.plot else ()))
    default = f"nDCG@10 RR@10 R@10 R@{args.candidates}"
    measures = gain.parse_measures(default if args.measures is None else args.measures)
    paths = _paths(args)
    _check_files(args, paths)
    grades, queries, corpus, before = _load(args, paths)
    ranker = open_ranker(where)
    start = time.monotonic()
    after = _rerank(ranker, queries, corpus, before, args.instruction)
    seconds = time.monotonic() - start
    gains = gain.measure(measures, grades, before, after)
    facts = {
        "queries": len(grades),
        "without_candidates": sum(not before.get(query) for query in grades),
        "documents": sum(map(len, before.values())),
        "first_stage": args.run or "bm25",
        "seconds": round(seconds, 1),
    }
    if args.output == "table" or (args.output == "auto" and sys.stdout.isatty()):
        with printing():
            _print(facts, gains)
    else:
        print_json(facts | {"measures": {g.name: g.summary for g in gains}})
    if args.per_query:  # the files come last: the result is printed even where the disk is full
        gain.write_per_query(Path(args.per_query), gains)
    if args.plot:
        gain.write_plot(Path(args.plot), gains[0])
    if args.save_run:
        _save_run(Path(args.save_run), after)


def _check_files(args: argparse.Namespace, paths: collection.Paths) -> None:
    """Hold the names of all files against each other.

    Raises:
        InputError: an output would replace a file that is needed, or an option has no effect.
        FailedError: an output cannot be written.
    """
    if args.run == "":
        raise InputError("--run='' names no file")
    inputs = [paths.corpus, paths.queries, paths.qrels, *([args.run] if args.run else [])]
    check_outputs({"--per-query": args.per_query, "--plot": args.plot, "--save-run": args.save_run}, inputs)
    if args.plot:
        gain.check_plot(args.plot)
    told_kinds = [told(str(path)) for path in inputs]
    if args.input_format and told_kinds[0] and told_kinds[1]:
        raise InputError("--input-format has no effect: the names of corpus and queries tell their forms")
    if args.encoding is not None and set(told_kinds) == {"parquet"}:
        raise InputError(f"--encoding {args.encoding} has no effect: Parquet is always UTF-8; leave it out")


def _require(*modules: str) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise FailedError(f"{' and '.join(missing)} missing; pip install -r requirements-eval.txt")


def _load(args: argparse.Namespace, paths: collection.Paths) -> tuple[Grades, dict[str, str], dict[str, str], Ranking]:
    """Judgements, texts of judged queries, texts of candidates, and the candidates.

    Raises:
        InputError: a part is missing, or an id has no text.
    """
    kind, encoding = args.input_format, args.encoding
    grades = judgements.read_grades(paths.qrels, encoding)
    queries = collection.read_texts(paths.queries, kind, encoding, None)
    _demand(grades, queries, paths.queries, "query")
    queries = {query: text for query, text in queries.items() if query in grades}
    judged = dict.fromkeys(chain(*grades.values()))
    if not args.run:
        corpus = collection.read_texts(paths.corpus, kind, encoding, None)
        _check_judged(judged, corpus, paths.corpus)
        return grades, queries, corpus, bm25.candidates(corpus, queries, args.candidates)
    ranking = judgements.read_run(Path(args.run), encoding, grades)
    ranking = {query: found[: args.candidates] for query, found in ranking.items()}
    if not ranking:
        raise InputError(f"{args.run} ranks no query of {paths.qrels}")
    wanted = dict.fromkeys(chain(*ranking.values()))
    corpus = collection.read_texts(paths.corpus, kind, encoding, wanted | judged)
    _demand(wanted, corpus, paths.corpus, "document")
    _check_judged(judged, corpus, paths.corpus)
    return grades, queries, corpus, ranking


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
    return collection.Paths(Path(args.corpus), Path(args.queries), Path(args.qrels))


def _demand(ids: Mapping[str, object], found: Mapping[str, str], path: Path, what: str) -> None:
    missing = [i for i in ids if i not in found]
    if missing:
        own = f"; its own first id is {next(iter(found))!r}" if found and len(missing) == len(ids) else ""
        raise InputError(
            f"{path} has no text for {len(missing)} of {len(ids)}, the first is {what} {missing[0]!r}{own}"
        )


def _check_judged(judged: Mapping[str, object], corpus: Mapping[str, str], path: Path) -> None:
    """Say which judged documents the corpus lacks: they count as not found.

    Raises:
        InputError: it lacks all of them.
    """
    missing = [document for document in judged if document not in corpus]
    if len(missing) == len(judged):
        _demand(judged, corpus, path, "judged document")
    if missing:
        note(
            f"{path} lacks {len(missing)} of {plural(len(judged), 'judged document')}, the first is {missing[0]!r}; "
            f"what is relevant among them counts as not found"
        )


def _rerank(
    ranker: Ranker, queries: dict[str, str], corpus: dict[str, str], before: Ranking, instruction: str | None
) -> Ranking:
    order = [query for query in queries if before.get(query)]
    requests = (RerankRequest(queries[q], [corpus[d] for d in before[q]], instruction) for q in order)
    after: Ranking = {}
    with meter(sum(len(before[q]) for q in order)) as shown:
        for query, outcome in zip(order, ranker.rank_many(requests), strict=True):
            if isinstance(outcome, RerankError):
                raise FailedError(f"query {query}: {outcome}")
            after[query] = [before[query][i] for i in outcome.best(None)]
            shown.advance(shown.done + len(outcome.scores), len(outcome.scores))
    return after


def _save_run(path: Path, after: Ranking) -> None:
    with writing(path), open(path, "w", encoding="utf-8") as file:
        for query, found in after.items():
            for i, document in enumerate(found):
                file.write(f"{query} Q0 {document} {i + 1} {len(found) - i} reranked\n")


def _print(facts: Mapping[str, Any], gains: list[gain.Gain]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("measure", "before", "after", "gain", "better", "equal", "worse"):
        table.add_column(name, justify="left" if name == "measure" else "right")
    for one in gains:
        numbers = one.summary
        colour = "green" if numbers["gain"] > 0 else "red" if numbers["gain"] < 0 else "dim"
        shown = [f"{numbers[key]:.4f}" for key in ("before", "after")]
        counts = [str(numbers[key]) for key in ("better", "equal", "worse")]
        table.add_row(one.name, *shown, f"[{colour}]{numbers['gain']:+.4f}[/]", *counts)
    console = Console()
    console.print(table)
    console.print(
        "{queries} queries ({without_candidates} without candidates), {documents} documents, first stage "
        "{first_stage}, {seconds} s".format(**facts),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
