"""`check`: load a model and score one pair; exit code 0 means that it can serve."""

from __future__ import annotations

import argparse
import time

from reranker.cli.options import source
from reranker.errors import CommandError, FailedError, ModelLoadError, RerankError
from reranker.rankers.ranker import rank_one
from reranker.rankers.source import open_ranker
from reranker.terminal import print_result
from reranker.types import RerankRequest


def check(args: argparse.Namespace) -> None:
    """Print the facts of the loaded model: JSON in a pipe, lines in a terminal."""
    origin = source(args)
    start = time.monotonic()
    try:
        ranker = open_ranker(origin)
        loaded = time.monotonic()
        documents = ["gzip compresses files to save disk space"]
        scored = rank_one(ranker, RerankRequest("how to compress files", documents, args.instruction))
    except (CommandError, ModelLoadError, RerankError):
        raise
    except Exception as error:  # libraries raise anything for a broken checkpoint, and `check` must report all of it
        if args.verbose:
            raise
        first = (str(error).strip().splitlines() or [""])[0]
        raise FailedError(f"cannot load: {type(error).__name__}: {first} (--verbose shows the traceback)") from None
    facts: dict[str, object] = {
        **ranker.facts,
        "load_seconds": round(loaded - start, 2),
        "score_seconds": round(time.monotonic() - loaded, 3),
        "score": scored.scores[0],
    }
    lines = [*(f"{name:17} {value}" for name, value in facts.items()), "ok"]
    print_result(facts | {"status": "ok"}, lambda: print("\n".join(lines)))
