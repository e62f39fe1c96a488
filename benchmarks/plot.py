"""Documents a second and CPU seconds of this project and its peers, drawn from the rows that were measured.

    python -m benchmarks.plot ROWS docs/peers.png

`benchmarks.servers` and `benchmarks.engine` append to ROWS with `--rows ROWS`. Of equal rows the last one counts.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

matplotlib.use("Agg")
from matplotlib import pyplot as plt

OURS = ("this service", "this engine")
COLOURS = ("tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink", "tab:gray", "tab:olive", "tab:cyan")


@dataclass(frozen=True, slots=True)
class Row:
    """One contestant under one load."""

    shape: str
    precision: str
    workload: str
    clients: int
    """0: in one process, without HTTP."""
    contestant: str
    documents_per_second: float
    processor_seconds: float
    """For 100 documents."""
    cores: float

    @property
    def load(self) -> str:
        """The label of the group of bars."""
        clients = f"{self.clients} client{'s' * (self.clients > 1)}" if self.clients else "in process"
        return f"{self.shape}, {self.workload}\n{self.precision}\n{clients}"


def append(file: Path, row: Row) -> None:
    """Add a row to a file of JSON lines."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(asdict(row)) + "\n")


def rows_of(file: Path) -> list[Row]:
    """The rows of a file, in order; of those with the same load and contestant the last."""
    rows = [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    return list({(row.load, row.contestant): row for row in rows}.values())


def draw(rows: list[Row]) -> Figure:
    """A figure of two panels: groups of bars by load, a colour for each contestant, ours blue."""
    loads = list(dict.fromkeys(row.load for row in rows))
    figure, axes = plt.subplots(2, 1, figsize=(max(7, 1.6 * len(loads)), 7), layout="constrained", sharex=True)
    colours = iter(COLOURS * len(rows))
    colour = {name: "tab:blue" if name in OURS else next(colours) for name in dict.fromkeys(r.contestant for r in rows)}
    _panel(
        axes[0], loads, {row: row.documents_per_second for row in rows}, colour, "documents a second (more is better)"
    )
    _panel(
        axes[1], loads, {row: row.processor_seconds for row in rows}, colour, "CPU s for 100 documents (less is better)"
    )
    handles = [Rectangle((0, 0), 1, 1, color=of) for of in colour.values()]
    figure.legend(handles, list(colour), loc="outside upper center", ncols=3, frameon=False)
    return figure


def _panel(axis: Axes, loads: list[str], values: dict[Row, float], colour: dict[str, str], label: str) -> None:
    for place, load in enumerate(loads):
        group = [row for row in values if row.load == load]
        width = 0.8 / len(group)
        for i, row in enumerate(group):
            at = place + (i - (len(group) - 1) / 2) * width
            bar = axis.bar(at, values[row], width=0.95 * width, color=colour[row.contestant])
            axis.bar_label(bar, fmt="%.3g", fontsize=8)
    axis.set_xticks(range(len(loads)), loads, fontsize=9)
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw a file of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("picture", type=Path)
    a = parser.parse_args()
    draw(rows_of(a.rows)).savefig(a.picture, dpi=90)


if __name__ == "__main__":
    main()
