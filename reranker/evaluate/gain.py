"""Measures before and after reranking, and their files: CSV by query, and a picture.

By ir-measures: retrieval research uses it, its authors maintain it, it is small, and its wheels contain trec_eval. ranx
would add numba and pandas; pytrec_eval has no wheels.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reranker.errors import InputError
from reranker.evaluate.judgements import Grades, Ranking
from reranker.rows.lines import writing


@dataclass(frozen=True, slots=True)
class Gain:
    """A measure of every judged query; a query without candidates counts as 0."""

    name: str
    before: dict[str, float]
    after: dict[str, float]

    @property
    def summary(self) -> dict[str, Any]:
        """Means over all queries, and the numbers of queries that are better, equal and worse after reranking."""
        before, after = (sum(values.values()) / len(values) for values in (self.before, self.after))
        changes = self.changes
        better, worse = sum(c > 1e-9 for c in changes), sum(c < -1e-9 for c in changes)
        counts = {"better": better, "equal": len(changes) - better - worse, "worse": worse}
        return {"before": before, "after": after, "gain": after - before} | counts

    @property
    def changes(self) -> list[float]:
        """The gain of each query, highest first."""
        return sorted((self.after[query] - self.before[query] for query in self.before), reverse=True)


def parse_measures(names: str) -> list[Any]:
    """Return the measures of a list of names of ir-measures, in any case.

    Raises:
        InputError: there is no such measure.
    """
    import ir_measures

    known = {measure.casefold(): measure for measure in ir_measures.measures.registry}
    words = re.findall(r"[^\s,]+", names)
    if not words:
        raise InputError("--measures names no measure; examples: nDCG@10 RR@10 R@100 AP")
    try:
        words = [re.sub(r"^\w+", lambda stem: known.get(stem[0].casefold(), stem[0]), word) for word in words]
        measures = [ir_measures.parse_measure(word) for word in words]
        return list({str(measure): measure for measure in measures}.values())
    except (NameError, ValueError, SyntaxError) as error:
        raise InputError(f"--measures: {error}; examples: nDCG@10 RR@10 R@100 AP") from None


def measure(measures: Sequence[Any], grades: Grades, before: Ranking, after: Ranking) -> list[Gain]:
    """Return each measure of every judged query, before and after."""
    old, new = (_values(measures, grades, ranking) for ranking in (before, after))
    return [Gain(str(m).replace("RR@", "MRR@"), old[str(m)], new[str(m)]) for m in measures]


def _values(measures: Sequence[Any], grades: Grades, ranking: Ranking) -> dict[str, dict[str, float]]:
    import ir_measures

    # Positions instead of scores: trec_eval reads 32-bit floats, in which high scores tie, and orders ties by id.
    runs = {q: {d: float(len(names) - i) for i, d in enumerate(names)} for q, names in ranking.items() if names}
    values: dict[str, dict[str, float]] = {str(m): dict.fromkeys(grades, 0.0) for m in measures}
    if runs:
        for metric in ir_measures.iter_calc(measures, grades, runs):
            values[str(metric.measure)][metric.query_id] = float(metric.value)
    return values


def write_per_query(path: Path, gains: Sequence[Gain]) -> None:
    """Write CSV: query, and each measure before and after."""
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["query", *(f"{g.name} {when}" for g in gains for when in ("before", "after"))])
        for query in gains[0].before:
            rows.writerow([query, *(round(values[query], 6) for g in gains for values in (g.before, g.after))])


def check_plot(name: str) -> None:
    """Refuse a suffix of which matplotlib writes no picture."""
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, known = Path(name).suffix[1:].lower(), FigureCanvasBase.get_supported_filetypes()
    if suffix and suffix not in known:  # without a suffix, matplotlib adds .png
        raise InputError(f"--plot={name}: {suffix} is no format of a picture; write .png, .svg or .pdf")


def write_plot(path: Path, gain: Gain) -> None:
    """Draw a bar for each query, highest gain first, with the means in the title."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    changes = gain.changes
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    axes.bar(range(len(changes)), changes, width=1.0, color=["#2a7f3f" if c >= 0 else "#b3362b" for c in changes])
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylim(-1.05, 1.05)
    axes.set_xticks([])
    axes.set_xlabel("queries, highest gain first: {better} better, {equal} equal, {worse} worse".format(**gain.summary))
    axes.set_ylabel(f"change of {gain.name}")
    axes.set_title("{}: {before:.4f} before, {after:.4f} after reranking".format(gain.name, **gain.summary))
    with writing(path):
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
