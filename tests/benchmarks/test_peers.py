"""A contestant in a process of its own returns the scores of the model card; a setting that is wrong is visible."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import floor
from benchmarks.peers import CHAT_TEMPLATE, CONTESTANTS, OURS, PAIR, available, start
from benchmarks.reference import Reference
from benchmarks.report import fewer_cores
from benchmarks.workloads import read


def test_a_contestant_below_its_cores_is_marked() -> None:
    assert fewer_cores(1.9, 2) == "1.90"
    assert fewer_cores(1.2, 2) == "1.20 of 2: FEWER"


def test_only_the_contestants_of_a_shape_that_are_installed_take_part(capsys: pytest.CaptureFixture[str]) -> None:
    decoders, encoders = available("mid"), available("minilm")
    assert decoders[:2] == list(CONTESTANTS)[:2]
    assert encoders[0] == OURS
    assert not [name for name in encoders if name.startswith("card")]
    left_out = capsys.readouterr().err
    assert ("OpenVINO, 1 pair" in decoders) != ("benchmarks/environments/openvino.sh" in left_out)


def test_the_prompts_of_the_peers_are_the_cards() -> None:
    assert PAIR.endswith("<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert CHAT_TEMPLATE.endswith("</think>\n\n\n"), "jinja strips one newline"


def test_the_floor_is_the_fastest_product_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "SECONDS", 0.0)
    monkeypatch.setitem(floor.ROWS, "cpu", 16)
    threads = torch.get_num_threads()
    one = floor.floor("minilm", "cpu", torch.float32, 100, 1)
    assert torch.get_num_threads() == threads
    assert one.seconds == one.processor_seconds == pytest.approx(floor.flop("minilm", 100) / one.gflops / 1e9)
    assert floor.flop("minilm", 1) == 2 * 6 * (4 * 384 * 384 + 2 * 384 * 1536)
    assert one.product in ("torch, float32", "oneDNN, float32")


@pytest.mark.slow
@pytest.mark.parametrize("name", [OURS, "card, batch 8, last position"])
def test_a_contestant_scores_on_command(name: str, model_path: Path) -> None:
    work = read("short", 2, 4)
    contestant = start(name, "mid", model_path, "cpu", "float32", 1)
    done = contestant.run(work)
    assert [len(scores) for scores in done.scores] == [4, 4]
    assert Reference(model_path, work).apart(done.scores) < 1e-5
    assert done.processor_seconds > 0
    assert contestant.leave() > 2**20
    assert contestant.process.returncode == 0
