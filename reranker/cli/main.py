"""The commands and their arguments, and the one place where an error becomes a line and an exit code.

argparse, because it is always there: four commands with flat options need no more.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from reranker import __version__
from reranker.cli.options import add_model_options, load_env_file
from reranker.errors import CommandError, FailedError, InputError, InvalidRequestError, ModelLoadError, RerankError
from reranker.rows.forms import KINDS
from reranker.terminal import discard_output, harmless, printing


class _Once(argparse._StoreAction):
    """An option with a value: the second of two would replace the first in silence."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: Any) -> None:
        """Store the value."""
        given = namespace.__dict__.setdefault("_given", set())
        if self.option_strings and self.dest in given:
            parser.error(f"{self.option_strings[-1]} is given twice; give it once")
        given.add(self.dest)
        super().__call__(parser, namespace, *rest)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in a line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Help or the version; argparse itself hides that it cannot be written."""
        with printing():
            print(message, end="", file=file)

    def error(self, message: str) -> NoReturn:
        """One line instead of the whole usage."""
        raise InputError(f"{message} (see {self.prog} --help)")


def count(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _add_input_options(to: argparse._ActionsContainer, kinds: Sequence[str], means: str, field: bool = True) -> None:
    to.add_argument("--input-format", choices=kinds, help=means)
    if field:
        to.add_argument(
            "--field", metavar="NAME", help="the column or key of the text; without it a known name (docs/files.md)"
        )
    to.add_argument("--encoding", metavar="NAME", help="without it: UTF-8; gb18030 for files that Chinese Excel saved")


def parser() -> argparse.ArgumentParser:
    """All commands."""
    top = Parser(prog="python -m reranker", description="Rank documents by relevance to a query, without a server.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    add = commands.add_parser("rank", help="one query: a table in a terminal, JSON in a pipe")
    add.add_argument("query", metavar="QUERY")
    add.add_argument("document", nargs="*", metavar="DOCUMENT", help="without any: --file or standard input")
    add.add_argument("--file", help="documents in any form below; - is standard input; blank lines are left out")
    _add_input_options(add, KINDS, "without it: by the end of the name (also .gz); lines where it has none")
    add.add_argument("--top-k", type=count, metavar="N", help="only the best N")
    add.add_argument("--output", choices=("auto", "table", "json"), default="auto")
    add_model_options(add)

    add = commands.add_parser("batch", help="many queries, JSON lines out; goes on after an interruption")
    add.add_argument(
        "input", metavar="IN", help='rows of {"query", "documents" or "document", "id"?, "top_k"?, "instruction"?}'
    )
    add.add_argument(
        "output", metavar="OUT.jsonl", help="complete when it is there; until then it is OUT.jsonl.partial"
    )
    _add_input_options(add, KINDS[1:], "without it: by the end of the name (also .gz)")
    add.add_argument("--top-k", type=count, metavar="N", help="only the best N, where a line does not say")
    add.add_argument("--skip-bad", action="store_true", help="report bad lines and go on")
    add.add_argument("--overwrite", action="store_true", help="replace OUT, and an unfinished one of other options")
    add_model_options(add)

    add = commands.add_parser("evaluate", help="measure the gain on your own data (needs requirements-eval.txt)")
    data = add.add_argument_group("data: a BEIR folder, or texts and TREC qrels")
    data.add_argument("--beir", metavar="DIR", help="corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; or in other forms")
    data.add_argument("--split", help="which qrels of a BEIR folder (default: test)")
    data.add_argument("--corpus", metavar="FILE", help="_id, text and title?; .txt: lines of id, tab, text")
    data.add_argument("--queries", metavar="FILE", help="the same")
    data.add_argument(
        "--qrels", metavar="FILE", help="query-id, corpus-id, score; .txt: TREC's query, 0, document, score"
    )
    data.add_argument("--run", metavar="FILE", help="TREC run with the candidates; without it BM25 finds them")
    _add_input_options(data, KINDS, "of --corpus and --queries, where their names do not tell it", field=False)
    add.add_argument("--candidates", type=count, default=100, metavar="N", help="how many are reranked (default: 100)")
    add.add_argument("--measures", metavar="LIST", help='of ir-measures; default: "nDCG@10 RR@10 R@10 R@N"')
    add.add_argument("--per-query", metavar="FILE.csv", help="every query before and after")
    add.add_argument("--plot", metavar="FILE.png", help="the gain of every query as a picture")
    add.add_argument("--save-run", metavar="FILE", help="the reranked candidates as a TREC run")
    add.add_argument("--output", choices=("auto", "table", "json"), default="auto")
    add_model_options(add)

    add = commands.add_parser("check", help="load, score one pair, say what was chosen; exit code 0 or 1")
    add_model_options(add)
    return top


def _check_text(words: Sequence[str]) -> None:
    """Refuse arguments whose bytes Python could not read as text: a model would score rubbish.

    Raises:
        InputError: says which argument, and where another encoding or locale helps.
    """
    for number, word in enumerate(words, 1):
        if not any("\udc80" <= c <= "\udcff" for c in word):
            continue
        encoding = sys.getfilesystemencoding()
        try:
            word.encode(encoding, "surrogateescape").decode()
        except UnicodeError:
            raise InputError(
                f"argument {number} is not UTF-8; convert it, or write it to a file and name it with --encoding"
            ) from None
        raise InputError(
            f"argument {number} is not {encoding.upper()}, the encoding of this locale; "
            f"set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        )


def main(argv: list[str] | None = None) -> None:
    """Run one command.

    Raises:
        CommandError, ModelLoadError, RerankError: `run` turns each into a line.
    """
    words = sys.argv[1:] if argv is None else argv
    _check_text(words)
    args, rest = parser().parse_known_args(words)
    if sys.stdout is None and args.command != "batch":
        raise FailedError("standard output is closed; the result has no place to go")
    if args.command == "rank" and not any(word.startswith("-") for word in rest):
        args.document += rest  # argparse takes positionals up to the first option only
    elif rest:
        raise InputError(f"unknown arguments: {' '.join(rest)} (see python -m reranker {args.command} --help)")
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.verbose else logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for warning in load_env_file():
        print(f"warning: {warning}", file=sys.stderr)
    if args.command == "rank":
        from reranker.cli.rank import rank as command
    elif args.command == "batch":
        from reranker.cli.batch import batch as command
    elif args.command == "evaluate":
        from reranker.evaluate.evaluation import evaluate as command
    else:
        from reranker.cli.check import check as command
    command(args)


def _fill_streams() -> None:
    """Give the numbers of closed standard streams to the null device.

    Else the next file that is opened takes the number, and receives what a library prints. `print` would also write
    to standard output what is meant for a closed standard error.
    """
    for stream in (sys.stdin, sys.stdout):
        if stream is None:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the whole process


def run(command: Callable[[], None] = main) -> NoReturn:
    """The program: exit code 0, 1 (failed) or 2 (bad input); an interruption ends it by its signal."""
    code = 0
    _fill_streams()
    try:
        with suppress(SystemExit):  # --help and --version; errors are InputError
            command()
        if sys.stdout is not None:
            with printing():
                pass
    except (CommandError, ModelLoadError, RerankError) as error:
        print(f"error: {harmless(str(error))}", file=sys.stderr)  # it may quote a file
        code = error.code if isinstance(error, CommandError) else 2 if isinstance(error, InvalidRequestError) else 1
    except BrokenPipeError:  # `... | head` has read enough
        discard_output()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        # By the signal itself: the shell then knows, and no thread that still reads or waits holds the end up.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(code)
