"""`python -m reranker`: the command line."""

import sys

_QUIET = {"-h", "--help", "--version", "completion"}

if sys.stderr is not None and sys.stderr.isatty() and len(sys.argv) > 1 and not _QUIET.intersection(sys.argv):
    # The imports alone take longer than a person waits for a sign of life; `main` erases it.
    print("loading...", end="\r", file=sys.stderr, flush=True)

from reranker.cli.main import run  # noqa: E402

if __name__ == "__main__":
    run()
