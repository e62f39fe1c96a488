"""`rank`: one query, its documents best first: a coloured table in a terminal, JSON in a pipe."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from reranker.cli.options import source
from reranker.errors import InputError
from reranker.rankers.ranker import Scored, open_ranker, rank_one
from reranker.rows import documents
from reranker.terminal import harmless, note, print_json, printing, truncated
from reranker.types import RerankRequest

# A table row shows one line: more of a text would only be cut again.
_SHOWN_CHARACTERS = 500


def rank(args: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        InputError: no query, no documents, or documents from two places.
    """
    where = source(args)
    if not args.query.strip():
        raise InputError("the query must not be empty")
    if args.file == "":
        raise InputError("--file='' names no file; - is standard input")
    if args.document and args.file:
        raise InputError("give documents as arguments or with --file, not both")
    given = {"--input-format": args.input_format, "--field": args.field, "--encoding": args.encoding}
    if args.document and any(value is not None for value in given.values()):
        option = next(name for name, value in given.items() if value is not None)
        raise InputError(f"{option} is for --file and standard input; documents that are arguments have no form")
    found = args.document or documents.read(args.file or "-", args.input_format, args.field, args.encoding)
    scored = rank_one(open_ranker(where), RerankRequest(args.query, found, args.instruction))
    best = scored.best(args.top_k)
    if scored.truncated:
        note(truncated(scored.truncated, args.url))
    if args.output == "table" or (args.output == "auto" and sys.stdout.isatty()):
        console = Console()
        with printing():
            console.print(_table(found, scored, best, console.width))
    else:
        print_json([{"index": i, "score": scored.scores[i], "text": found[i]} for i in best])


def _table(found: Sequence[str], scored: Scored, best: Sequence[int], columns: int) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    # Fixed widths: rich would shorten every column alike, the numbers too. It counts Chinese characters double.
    numbers = max(5, len(str(len(found))))
    table.add_column("score", justify="right", width=6)
    table.add_column("index", justify="right", width=numbers)
    table.add_column("document", no_wrap=True, overflow="ellipsis", width=max(20, columns - numbers - 10))
    for i in best:
        score = scored.scores[i]
        colour = "green" if score >= 0.5 else "yellow" if score >= 0.1 else "red"
        # Text, not markup: brackets in a document are only brackets.
        table.add_row(
            Text(f"{score:.4f}", colour), Text(str(i), "dim"), Text(harmless(found[i][:_SHOWN_CHARACTERS]).strip())
        )
    return table
