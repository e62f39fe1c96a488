"""Systems side by side: the measures of each, and its difference to the first one that is compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from reranker.evaluate.judgements import Grades, Ranking
from reranker.evaluate.measures import Values, measure, parse_measures
from reranker.evaluate.statistics import CONFIDENCE, FEW_QUERIES, RESAMPLES, Difference, difference


@dataclass(frozen=True, slots=True)
class Result:
    """The ranking of a system, and its measures."""

    name: str
    ranking: Ranking
    values: Values
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Model, instruction, run and more, as far as they are known."""

    def mean(self, name: str) -> float:
        """Return the mean of a measure over all judged queries."""
        values = self.values[name]
        return sum(values.values()) / len(values)


@dataclass(frozen=True, slots=True)
class Example:
    """A query that a system ranks better or worse than the reference, by the first measure."""

    system: str
    query: str
    change: float
    text: str
    reference_top: tuple[str, str]
    """Id and text of the document that the reference ranks first; empty if there is none."""
    top: tuple[str, str]
    """The same for the system."""


@dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
        facts: data set, numbers of queries and documents, first stage.
        results: the first stage, if there is one, then the systems.
        reference: the name of the result that the others are compared with.
        examples: of every system but the first stage and the reference, the largest gains, then the largest losses.
    """

    facts: Mapping[str, Any]
    results: Sequence[Result]
    reference: str
    examples: Sequence[Example] = ()

    @property
    def measures(self) -> list[str]:
        """Names of the measures."""
        return list(self.results[0].values)

    @property
    def base(self) -> Result:
        """The result that the others are compared with."""
        return next(result for result in self.results if result.name == self.reference)

    @property
    def others(self) -> list[Result]:
        """The results that are compared with the reference, without a first stage that is not the reference."""
        return [r for r in self.results if r.name not in (self.reference, self.facts.get("first_stage"))]

    @cached_property
    def differences(self) -> dict[tuple[str, str], Difference]:
        """(measure, system) -> its difference to the reference."""
        return {
            (name, result.name): difference(list(self.base.values[name].values()), list(result.values[name].values()))
            for name in self.measures
            for result in self.results
            if result.name != self.reference
        }

    @property
    def verdicts(self) -> list[str]:
        """A sentence on each of `others`: whether the first measure shows a difference to the reference.

        With k others, p counts below 0.05 / k (Bonferroni).
        """
        name, found = self.measures[0], []
        for result in self.others:
            change, level = self.differences[name, result.name], (1 - CONFIDENCE) / len(self.others)
            queries = change.better + change.equal + change.worse
            if change.p is not None and change.p < level:
                better = "better" if change.mean > 0 else "worse"
                verdict = (
                    f"{better} than {self.reference} by {name}: {change.mean:+.4f}, p {change.p:.4f} < {level:.4g}"
                )
            else:
                p = "one query proves nothing" if change.p is None else f"p {change.p:.4f}, not below {level:.4g}"
                verdict = f"no difference to {self.reference} is shown by {name} ({p})"
                verdict += ": judge more queries, or take the cheaper"
            few = f"; {queries} queries are few, the interval is too narrow" if 1 < queries < FEW_QUERIES else ""
            found.append(f"{result.name}: {verdict}{few}")
        return found

    def json(self) -> dict[str, Any]:
        """Return everything but the values of single queries, as one JSON object."""
        systems = []
        for result in self.results:
            measures = {}
            for name in self.measures:
                change = self.differences.get((name, result.name))
                measures[name] = {"mean": result.mean(name), "difference": None if change is None else asdict(change)}
            systems.append({"name": result.name, **result.facts, "measures": measures})
        statistics = {"reference": self.reference, "confidence": CONFIDENCE, "resamples": RESAMPLES}
        found = {"systems": systems, "verdicts": self.verdicts, "examples": [asdict(e) for e in self.examples]}
        return {**self.facts, **statistics, **found}


def compare(
    grades: Grades, runs: Mapping[str, Ranking], measures: str = "nDCG@10 RR@10 R@10 R@100", reference: str = ""
) -> Report:
    """Measure rankings of the same judged queries, and compare each with one of them, the first by default.

    Args:
        grades: query id -> document id -> relevance.
        runs: name -> query id -> document id -> score. Documents are ranked by score; a missing query counts as 0.
        measures: names of ir-measures, separated by blanks.
        reference: a name of `runs`.

    Raises:
        InputError: there is no such measure.
        KeyError: `runs` is empty, or has no such reference.
    """
    parsed = parse_measures(measures)
    results = []
    for name, run in runs.items():
        ranking = {query: dict(sorted(found.items(), key=lambda item: -item[1])) for query, found in run.items()}
        results.append(Result(name, ranking, measure(parsed, grades, ranking)))
    if not results or (reference and reference not in runs):
        raise KeyError(reference)
    return Report({"queries": len(grades)}, results, reference or results[0].name)


def examples(report: Report, queries: Mapping[str, str], corpus: Mapping[str, str], count: int) -> list[Example]:
    """Return the `count` largest gains and the `count` largest losses of each of `report.others`."""
    name, base = report.measures[0], report.base

    def top(result: Result, query: str) -> tuple[str, str]:
        document = next(iter(result.ranking.get(query, ())), "")
        return document, corpus.get(document, "")

    found = []
    for result in report.others:
        changes = {query: value - base.values[name][query] for query, value in result.values[name].items()}
        gains = sorted((q for q in changes if changes[q] > 1e-9), key=lambda q: -changes[q])[:count]
        losses = sorted((q for q in changes if changes[q] < -1e-9), key=lambda q: changes[q])[:count]
        found += [
            Example(result.name, q, changes[q], queries.get(q, ""), top(base, q), top(result, q))
            for q in (*gains, *losses)
        ]
    return found
