"""The picture of the peers is drawn from the rows that were measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
from matplotlib.patches import Rectangle

from benchmarks.plot import Row, append, draw, rows_of

ROWS = [
    Row("mid", "float32", "short", 1, "this service", 20.0, 9.0, 1.9),
    Row("mid", "float32", "short", 1, "vLLM", 15.0, 12.0, 1.9),
    Row("mid", "float32", "drawn", 0, "this engine", 22.0, 8.5, 1.9),
]


def test_every_row_is_a_bar_in_both_panels() -> None:
    figure = draw(ROWS)
    try:
        for axis, values in zip(figure.axes, ([20.0, 15.0, 22.0], [9.0, 12.0, 8.5]), strict=True):
            bars = [bar for bar in axis.patches if isinstance(bar, Rectangle)]
            assert [bar.get_height() for bar in bars] == values
            colours = [bar.get_facecolor() for bar in bars]
            assert colours[0] == colours[2] != colours[1], "this project has one colour"
            assert [label.get_text() for label in axis.texts] == [f"{value:.3g}" for value in values]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == ["this service", "vLLM", "this engine"]
    finally:
        plt.close(figure)


def test_the_last_of_equal_rows_counts(tmp_path: Path) -> None:
    file = tmp_path / "rows"
    newer = replace(ROWS[0], documents_per_second=21.0)
    for row in (*ROWS, newer):
        append(file, row)
    assert rows_of(file) == [newer, *ROWS[1:]]


@pytest.mark.parametrize(("clients", "words"), [(0, "in process"), (1, "1 client"), (8, "8 clients")])
def test_a_load_names_its_clients(clients: int, words: str) -> None:
    assert replace(ROWS[0], clients=clients).load == f"mid, short\nfloat32\n{words}"
