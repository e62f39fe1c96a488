"""`python -m reranker`: the command line."""

from reranker.cli.main import run

if __name__ == "__main__":
    run()
