"""`rank`: the documents of one query, best first: a coloured table in a terminal, JSON in a pipe."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reranker.cli.options import source
from reranker.errors import FailedError, InputError
from reranker.rankers.ranker import Scored, rank_one
from reranker.rankers.source import open_ranker
from reranker.rows import documents
from reranker.terminal import harmless, note, print_result, printing, truncated
from reranker.types import RerankRequest

MAX_SHOWN = 500  # characters of a document in the table, where a row is one line


def rank(args: argparse.Namespace) -> None:
    """Rank the documents and print them."""
    origin = source(args)
    if not args.query.strip():
        raise InputError("the query must not be empty")
    texts = _texts(args)
    scored = rank_one(open_ranker(origin), RerankRequest(args.query, texts, args.instruction))
    best = scored.best(args.top_k)
    if scored.truncated:
        note(truncated(scored.truncated, args.url))
    rows = [{"index": i, "score": scored.scores[i], "text": texts[i]} for i in best]
    if args.output in ("csv", "jsonl"):
        _print_lines(rows, args.output)
    else:
        print_result(rows, lambda: _print(texts, scored, best), args.output)


def _texts(args: argparse.Namespace) -> list[str]:
    if args.file == "":
        raise InputError("--file='' names no file; - is standard input")
    if args.document and args.file:
        raise InputError("give documents as arguments or with --file, not both")
    if not args.document:
        return documents.read(args.file or "-", args.input_format, args.field, args.encoding)
    for option in ("input_format", "field", "encoding"):
        if getattr(args, option) is not None:
            name = "--" + option.replace("_", "-")
            raise InputError(f"{name} is for --file and standard input; documents that are arguments have no form")
    return list(args.document)


def _print_lines(rows: Sequence[dict[str, object]], output: str) -> None:
    file = io.StringIO()
    if output == "csv":
        table = csv.DictWriter(file, ("index", "score", "text"), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    else:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    with printing():
        try:
            print(file.getvalue(), end="")
        except UnicodeEncodeError:  # a lone surrogate, or a terminal that is not UTF-8
            raise FailedError("standard output cannot hold a document's characters: use --output json") from None


def _print(texts: Sequence[str], scored: Scored, best: Sequence[int]) -> None:
    console = Console()
    table = Table(box=None, header_style="bold", pad_edge=False)
    # Fixed widths: rich would shorten every column alike, the numbers too. It counts Chinese characters double.
    numbers = max(5, len(str(len(texts))))
    table.add_column("score", justify="right", width=6)
    table.add_column("index", justify="right", width=numbers)
    table.add_column("document", no_wrap=True, overflow="ellipsis", width=max(20, console.width - numbers - 10))
    for i in best:
        score = scored.scores[i]
        colour = "green" if score >= 0.5 else "yellow" if score >= 0.1 else "red"
        # Text, not markup: brackets in a document are only brackets.
        table.add_row(Text(f"{score:.4f}", colour), Text(str(i), "dim"), Text(harmless(texts[i][:MAX_SHOWN]).strip()))
    console.print(table)
