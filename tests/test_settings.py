"""The settings of the model as texts, as keywords of `Scorer.load`, and their error texts."""

from __future__ import annotations

from pathlib import Path

import pytest

from reranker.environment import SettingsError
from reranker.settings import ModelSettings, read


def test_what_is_not_set_is_left_to_the_scorer() -> None:
    assert ModelSettings().load_options() == {
        "device": "auto",
        "precision": "auto",
        "max_memory_percentage": 90,
        "max_seq_length": 8192,
    }


def test_texts_become_keywords() -> None:
    texts = {
        "model_name_or_path": "Qwen/X",
        "model_revision": "v1",
        "model_device": "CUDA:1",
        "model_precision": "BF16",
        "batch_size": "4",
        "max_batch_tokens": "Auto",
        "default_instruction": "Find C# code",
    }
    assert read({field: (field, text) for field, text in texts.items()}).load_options() == {
        "name": "Qwen/X",
        "revision": "v1",
        "device": "cuda:1",
        "precision": "bf16",
        "max_memory_percentage": 90,
        "max_seq_length": 8192,
        "batch_size": 4,
        "instruction": "Find C# code",
    }


@pytest.mark.parametrize(
    ("field", "text", "reason"),
    [
        ("max_memory_percentage", "nan", "allowed: a number, 1 to 100"),
        ("max_memory_percentage", "inf", "allowed: a number, 1 to 100"),
        ("max_seq_length", "8k", "allowed: a whole number, 128 to 131072"),
        ("batch_size", "", "allowed: a whole number, 1 to 65536 or auto"),
        ("model_device", "", "allowed: auto, cpu, cuda or cuda:N"),
        ("model_precision", "", "allowed: auto, bfloat16"),
    ],
)
def test_a_text_that_cannot_be_used_names_the_allowed_ones(field: str, text: str, reason: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read({"model_revision": ("--revision", "v1"), field: ("--option", text)})
    assert str(caught.value).startswith(f"--option={text!r} cannot be used; {reason}")


def test_every_text_that_cannot_be_used_has_a_line() -> None:
    texts = {"batch_size": ("--batch-size", "few"), "max_seq_length": ("MAX_SEQ_LENGTH", "8k")}
    with pytest.raises(SettingsError) as caught:
        read(texts)
    assert sorted(line.partition(" ")[0] for line in str(caught.value).split("\n")) == [
        "--batch-size='few'",
        "MAX_SEQ_LENGTH='8k'",
    ]


def test_a_folder_gets_its_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert ModelSettings(model_name_or_path="mine").resolved().model_name_or_path == str(tmp_path / "mine")
    for name in ("", "Qwen/X"):
        assert ModelSettings(model_name_or_path=name).resolved().model_name_or_path == name
