"""`check`: load a model and score one pair; exit code 0 means that it can serve. `--plan` loads nothing."""

from __future__ import annotations

import argparse
import time
from typing import Any

from reranker.cli.options import source
from reranker.errors import CommandError, FailedError, InputError, ModelLoadError, RerankError
from reranker.rankers.ranker import rank_one
from reranker.rankers.source import Source, open_ranker
from reranker.terminal import note, print_result
from reranker.types import RerankRequest


def check(args: argparse.Namespace) -> None:
    """Print the facts of the loaded model: JSON in a pipe, lines in a terminal."""
    origin = source(args)
    if args.plan:
        _print_plan(origin)
        return
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


def plan_table(plan: dict[str, Any]) -> str:
    """Return a plan (see `memory_plan`) as a table in GiB."""
    rows = plan["models"]
    sizes = ("weights", "loading", "batch", "prefix", "needed")
    lines = [["model", "precision", *sizes, *(f"{card} GB" for card in rows[0]["fits"])]]
    for row in rows:
        gib = (f"{row[f'{size}_bytes'] / (1 << 30):.2f}" for size in sizes)
        lines.append([row["model"], row["precision"], *gib, *("yes" if fits else "-" for fits in row["fits"].values())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _print_plan(origin: Source) -> None:
    if origin.url:
        raise InputError("--plan is for a model in this process; leave out --url")
    from reranker.rankers.plan import memory_plan

    plan = memory_plan(origin.model)
    if origin.model.model_device == "cpu":
        note("the plan is for GPUs; the device cpu has no part in it")
    explained = (
        f"GiB on a GPU with MAX_MEMORY_PERCENTAGE={plan['max_memory_percentage']:g}; needed = weights + the larger of "
        f"loading and batch + prefix; a batch has {plan['batch_tokens']:,} tokens"
    )
    print_result(plan, lambda: print(f"{plan_table(plan)}\n{explained}"))
