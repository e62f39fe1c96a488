"""The commands and their arguments, and the only place where an error becomes a line and an exit code.

argparse, because the standard library has it and commands with flat options need no more.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from reranker import __version__
from reranker.errors import CommandError, FailedError, InputError, InvalidRequestError, ModelLoadError, RerankError
from reranker.rows.forms import KINDS, ROW_KINDS
from reranker.terminal import discard_output, harmless, printing

MAX_CONNECTIONS = 64
"""Requests in flight by --concurrency."""


class _Once(argparse._StoreAction):
    """Store a value, and refuse the option a second time: argparse would replace the first value."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *rest: Any) -> None:
        """Store the value."""
        given = namespace.__dict__.setdefault("_given", set())
        if self.option_strings and self.dest in given:
            parser.error(f"{self.option_strings[-1]} is given twice; give it once")
        given.add(self.dest)
        super().__call__(parser, namespace, *rest)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in (None, "store"):
            self.register("action", name, _Once)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help or the version; argparse itself ignores write errors."""
        with printing():
            print(message, end="", file=file)

    def error(self, message: str) -> NoReturn:
        """Raise one line instead of printing the whole usage."""
        raise InputError(f"{message} (see {self.prog} --help)")


def count(text: str) -> int:
    """Return a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def connections(text: str) -> int:
    """Return a whole number of at least 1 and at most 64."""
    if not text.isdecimal() or not 1 <= int(text) <= MAX_CONNECTIONS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 to {MAX_CONNECTIONS}")
    return int(text)


def number(text: str) -> int:
    """Return a whole number."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number")
    return int(text)


_OUTPUTS = ("auto", "table", "json")


def _add_input_options(to: argparse._ActionsContainer, kinds: Sequence[str], default: str, field: bool = True) -> None:
    to.add_argument("--input-format", choices=kinds, help=default)
    if field:
        to.add_argument(
            "--field", metavar="NAME", help="column or key of the text; default: a known name (docs/files.md)"
        )
    to.add_argument("--encoding", metavar="NAME", help="default: UTF-8; gb18030 for files from Chinese Excel")


def _add_concurrency(to: argparse.ArgumentParser) -> None:
    text = f"requests in flight to --url, 1 to {MAX_CONNECTIONS} (default: 4); more help with several workers"
    to.add_argument("--concurrency", type=connections, metavar="N", help=text)


def _rank(add: argparse.ArgumentParser) -> None:
    add.add_argument("query", metavar="QUERY")
    add.add_argument("document", nargs="*", metavar="DOCUMENT", help="default: --file or standard input")
    add.add_argument("--file", help="documents in any form below; - is standard input; blank lines are skipped")
    _add_input_options(add, KINDS, "default: by the suffix of the name (also .gz); lines where it has none")
    add.add_argument("--top-k", type=count, metavar="N", help="only the best N")
    text = "default: table in a terminal, json in a pipe; jsonl: an object a line; csv: index, score, text"
    add.add_argument("--output", choices=(*_OUTPUTS, "jsonl", "csv"), default="auto", help=text)


def _batch(add: argparse.ArgumentParser) -> None:
    row = '{"query", "documents" or "document", "id"?, "top_k"?, "instruction"?}'
    add.add_argument("input", metavar="IN", help=f"rows of {row}")
    add.add_argument(
        "output", metavar="OUT.jsonl", help="exists when the batch is complete; OUT.jsonl.partial until then"
    )
    _add_input_options(add, ROW_KINDS, "default: by the suffix of the name (also .gz)")
    add.add_argument("--top-k", type=count, metavar="N", help="only the best N, for rows without top_k")
    add.add_argument("--skip-bad", action="store_true", help="report bad lines and continue")
    add.add_argument("--overwrite", action="store_true", help="replace OUT, and an unfinished one of other options")
    _add_concurrency(add)


def _evaluate(add: argparse.ArgumentParser) -> None:
    data = add.add_argument_group("data: a BEIR folder, or texts and TREC qrels")
    data.add_argument("--beir", metavar="DIR", help="corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; or in other forms")
    data.add_argument("--split", help="qrels of a BEIR folder (default: test)")
    data.add_argument("--corpus", metavar="FILE", help="_id, text and title?; .txt: lines of id, tab, text")
    data.add_argument("--queries", metavar="FILE", help="the same")
    data.add_argument(
        "--qrels", metavar="FILE", help="query-id, corpus-id, score; .txt: TREC's query, 0, document, score"
    )
    data.add_argument("--run", metavar="FILE", help="TREC run with the candidates; default: candidates by BM25")
    _add_input_options(data, KINDS, "of --corpus and --queries, where their names do not tell it", field=False)
    add.add_argument("--candidates", type=count, default=100, metavar="N", help="max reranked per query (default: 100)")
    add.add_argument("--measures", metavar="LIST", help='of ir-measures; default: "nDCG@10 RR@10 R@10 R@N"')
    add.add_argument(
        "--compare", metavar="FILE", action="append", help="a saved run; may be repeated; alone, nothing is reranked"
    )
    add.add_argument(
        "--examples", type=number, default=3, metavar="N", help="queries with the largest gains and losses (default: 3)"
    )
    add.add_argument("--per-query", metavar="FILE.csv", help="measures of every query and system")
    add.add_argument("--plot", metavar="FILE.png", help="every query: a system against the reference")
    add.add_argument("--save-run", metavar="FILE", help="candidates and scores of the reranker as a TREC run")
    add.add_argument("--overwrite", action="store_true", help="replace existing files of these three names")
    add.add_argument("--output", choices=(*_OUTPUTS, "markdown"), default="auto")
    _add_concurrency(add)


def _completion(add: argparse.ArgumentParser) -> None:
    add.add_argument("shell", choices=("bash", "zsh"), metavar="bash|zsh")


def _serve(add: argparse.ArgumentParser) -> None:
    add.description = (
        "Serve HTTP under gunicorn, with the demo model where none is set. All settings are variables of the "
        "environment or lines of .env in this folder, as in: PORT=8000 reranker serve"
    )


def _check(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--plan",
        action="store_true",
        help="load nothing; print the memory that the model needs in each precision, and the GPUs that it fits "
        "(without a model: that of the official ones)",
    )


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "serve": ("the HTTP service; settings come from the environment and .env", _serve),
    "rank": ("one query: a table in a terminal, JSON in a pipe", _rank),
    "batch": ("many queries, JSON lines out; continues after an interruption", _batch),
    "evaluate": ("measure the gain on your own data (needs the packages of the extra eval)", _evaluate),
    "check": ("load, score one pair, print the choices; exit code 0 or 1", _check),
    "completion": ('complete in a shell: eval "$(%(prog)s completion bash)"', _completion),
}
"""Name -> help and arguments. `reranker.cli.NAME` has a function NAME that runs it, and is imported only then."""
_WITHOUT_MODEL = {"serve", "completion"}


def program() -> str:
    """Return the command as it was started: the script of an installed package, or the module."""
    return "reranker" if Path(sys.argv[0]).name == "reranker" else "python -m reranker"


def parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of all commands, with the arguments of those in `words`: the settings take long to import."""
    top = Parser(prog=program(), description="Rank documents by relevance to a query, with or without a server.")
    top.add_argument("--version", action="version", version=__version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    needed = COMMANDS if "completion" in words else words
    for name, (text, add_arguments) in COMMANDS.items():
        add = commands.add_parser(name, help=text)
        if name not in needed:
            continue
        add_arguments(add)
        if name in _WITHOUT_MODEL:
            add.set_defaults(verbose=False, commands=commands.choices)
        else:
            from reranker.cli.options import add_model_options

            add_model_options(add, several=name == "evaluate")
    return top


def _check_text(words: Sequence[str]) -> None:
    """Refuse arguments whose bytes Python could not decode: the model would score rubbish."""
    encoding = sys.getfilesystemencoding()
    for number, word in enumerate(words, 1):
        if not any("\udc80" <= c <= "\udcff" for c in word):
            continue
        try:
            word.encode(encoding, "surrogateescape").decode()
        except UnicodeError:
            problem = "is not UTF-8; convert it, or write it to a file and name it with --encoding"
        else:
            problem = f"is not {encoding.upper()}, the encoding of this locale; set LC_ALL=C.UTF-8, or PYTHONUTF8=1"
        raise InputError(f"argument {number} {problem}")


def main(argv: list[str] | None = None) -> None:
    """Run one command; `run` prints its CommandError, ModelLoadError or RerankError."""
    words = sys.argv[1:] if argv is None else argv
    _check_text(words)
    args, rest = parser(words).parse_known_args(words)
    from reranker.cli.options import load_env_file

    if sys.stdout is None and args.command not in ("batch", "serve"):
        raise FailedError("standard output is closed; the result has no place to go")
    if args.command == "rank" and not any(word.startswith("-") for word in rest):
        args.document += rest  # argparse takes positionals up to the first option only
    elif rest:
        raise InputError(f"unknown arguments: {' '.join(rest)} (see {program()} {args.command} --help)")
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.verbose else logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    for warning in [] if args.command == "serve" else load_env_file():  # the service reads `.env` itself
        print(f"warning: {warning}", file=sys.stderr)
    command = getattr(importlib.import_module(f"reranker.cli.{args.command}"), args.command)
    if sys.stderr.isatty() and args.command != "completion":
        print("\33[2K", end="", file=sys.stderr, flush=True)  # the line of `__main__`
    command(args)


def _fill_streams() -> None:
    """Open the null device for closed standard streams.

    Otherwise the next opened file gets the descriptor and receives the output of libraries, and `print` writes to
    standard output if standard error is closed.
    """
    for stream in (sys.stdin, sys.stdout):
        if stream is None:
            os.open(os.devnull, os.O_RDWR)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # for the whole process


def run(command: Callable[[], None] = main) -> NoReturn:
    """Run the program: exit code 0, 1 (failed) or 2 (bad input); SIGINT ends it by the signal itself."""
    code = 0
    _fill_streams()
    try:
        with suppress(SystemExit):  # --help and --version; errors are InputError
            command()
        if sys.stdout is not None:
            with printing():
                pass
    except (CommandError, ModelLoadError, RerankError) as error:
        for line in error.args if isinstance(error, CommandError) else [error]:
            print(f"error: {harmless(str(line))}", file=sys.stderr)  # the text may quote a file
        code = error.code if isinstance(error, CommandError) else 2 if isinstance(error, InvalidRequestError) else 1
    except BrokenPipeError:  # such as `... | head`
        discard_output()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        # By the signal itself: the shell sees it, and threads that read or wait do not delay the exit.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    sys.exit(code)
