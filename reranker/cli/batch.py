"""`batch`: many rows in, JSON lines out."""

from __future__ import annotations

import argparse
from pathlib import Path

from reranker.batch.local import Job, run
from reranker.cli.options import source
from reranker.errors import InputError
from reranker.rows.forms import structured_kind
from reranker.rows.row import Defaults


def batch(args: argparse.Namespace) -> None:
    """Run the command; see `local.run` for errors.

    Raises:
        InputError: the output is named after another form than JSON lines.
    """
    if structured_kind(args.output) in ("csv", "tsv", "parquet") or args.output.lower().endswith(".gz"):
        raise InputError(f"{args.output}: the output is JSON lines, not compressed: name it *.jsonl")
    job = Job(
        input=args.input,
        output=Path(args.output),
        source=source(args),
        defaults=Defaults(args.top_k, args.instruction),
        input_format=args.input_format,
        field=args.field,
        encoding=args.encoding,
        skip_bad=args.skip_bad,
        overwrite=args.overwrite,
    )
    run(job)
