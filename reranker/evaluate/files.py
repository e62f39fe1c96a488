"""The output files of an evaluation: CSV by query, and a picture."""

from __future__ import annotations

import csv
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from reranker.errors import InputError
from reranker.evaluate.comparison import Report, Result
from reranker.rows.lines import writing
from reranker.terminal import harmless, note, plural

_COLUMNS = 3
"""Pictures side by side."""
_LARGEST = 800.0
"""Area of the largest dot, in square points."""
_MAX_INSTRUCTION = 100
"""Characters of an instruction below the pictures."""


def write_per_query(path: Path, report: Report) -> None:
    """Write CSV: query, and each measure of each system."""
    with writing(path), open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        pairs = [(name, result) for name in report.measures for result in report.results]
        rows.writerow(["query", *(f"{name} {result.name}" for name, result in pairs)])
        for query in report.base.values[report.measures[0]]:
            rows.writerow([query, *(round(result.values[name][query], 6) for name, result in pairs)])


def check_plot(name: str) -> None:
    """Refuse a suffix of which matplotlib writes no picture."""
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, known = Path(name).suffix[1:].lower(), FigureCanvasBase.get_supported_filetypes()
    if suffix and suffix not in known:  # without a suffix, matplotlib adds .png
        raise InputError(f"--plot={name}: {suffix} is no format of a picture; write .png, .svg or .pdf")


def write_plot(path: Path, report: Report) -> None:
    """Draw each system against the reference: a point per query, by the first measure, larger for several queries."""
    import matplotlib

    matplotlib.use("Agg")  # a file, no window
    from matplotlib import pyplot

    others = report.others
    columns = min(_COLUMNS, len(others))
    rows = -(-len(others) // columns)
    figure, grid = pyplot.subplots(
        rows, columns, figsize=(5 * columns, 5.3 * rows), layout="constrained", squeeze=False
    )
    for axes, result in zip(grid.flat, others, strict=False):
        _scatter(axes, report, result)
    for axes in list(grid.flat)[len(others) :]:
        axes.set_visible(False)
    data, queries = report.facts.get("data", ""), plural(report.facts["queries"], "query", "queries")
    figure.suptitle(_plain(f"{data}, {queries}" if data else queries))
    figure.supxlabel(_plain("\n".join(_instructions(report))), fontsize=8)
    with writing(path), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(path, dpi=150)
    pyplot.close(figure)
    if any("missing from font" in str(warning.message) for warning in caught):
        note(f"{path}: the font of the picture lacks some characters of names or instructions")


def _instructions(report: Report) -> list[str]:
    """Return a line for each system that has an instruction."""
    found = {result.name: result.facts.get("instruction") for result in report.results}
    return [f"{name}: {harmless(text[:_MAX_INSTRUCTION])}" for name, text in found.items() if text]


def _scatter(axes: Any, report: Report, result: Result) -> None:
    name = report.measures[0]
    base, change = report.base, report.differences[name, result.name]
    points = Counter(
        (round(base.values[name][query], 3), round(value, 3)) for query, value in result.values[name].items()
    )
    colours = ["#2a7f3f" if y > x else "#b3362b" if y < x else "#777777" for x, y in points]
    scale = min(20.0, _LARGEST / max(points.values()))
    areas = [max(5.0, scale * count) for count in points.values()]  # square points
    axes.axline((0, 0), slope=1, color="black", linewidth=0.8)
    axes.scatter([x for x, _ in points], [y for _, y in points], s=areas, c=colours, alpha=0.6, clip_on=False)
    axes.set_xlabel(_plain(f"{name} of {base.name}: mean {base.mean(name):.4f}"))
    axes.set_ylabel(_plain(f"{name} of {result.name}: mean {result.mean(name):.4f}"))
    axes.set_aspect("equal", adjustable="datalim")
    interval = "" if change.low is None else f" [{change.low:+.4f}, {change.high:+.4f}], p = {change.p:.4f}"
    counts = f"{change.better} better, {change.equal} equal, {change.worse} worse"
    axes.set_title(f"{change.mean:+.4f}{interval}\n{counts}", fontsize=10)


def _plain(text: str) -> str:
    """Return a text without formulas: matplotlib reads what is between dollar signs as one."""
    return text.replace("$", r"\$")
