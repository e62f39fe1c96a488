"""Measure what reranking gains on labelled data, and compare models, instructions and saved runs (docs/evaluate.md)."""

from reranker.evaluate.collection import Paths, beir
from reranker.evaluate.comparison import Example, Report, Result, compare
from reranker.evaluate.evaluation import Job, System, evaluate, write_files
from reranker.evaluate.statistics import Difference, difference
from reranker.rankers.source import Source

__all__ = [
    "Difference",
    "Example",
    "Job",
    "Paths",
    "Report",
    "Result",
    "Source",
    "System",
    "beir",
    "compare",
    "difference",
    "evaluate",
    "write_files",
]
