from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from reranker import ModelLoadError, Scorer
from reranker.engine import model
from reranker.engine.model import locate, parameters
from tests.conftest import make_model


@pytest.fixture
def copy(model_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_path, tmp_path / "copy"))


def refused(path: Path | str, **options: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        Scorer.load(path, device="cpu", **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change(path: Path, **values: object) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("name", ["./models/none", "/nonexistent/model", "models/Qwen3-Reranker-4B", "~/none/at/all"])
def test_a_missing_folder_says_how_to_download(name: str) -> None:
    message = refused(name)
    assert "does not exist" in message
    assert "hf download Qwen/Qwen3-Reranker-4B --local-dir" in message
    assert "modelscope download" in message


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"pickle")
    assert "no *.safetensors" in refused(copy)


def test_a_hub_name_is_downloaded_with_its_revision(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        assert "*.safetensors" in allow_patterns
        assert not any(p.endswith((".bin", ".py", ".pt")) for p in allow_patterns)
        return str(model_path)

    monkeypatch.setattr(model, "snapshot_download", download)
    scorer = Scorer.load("Qwen/Qwen3-Reranker-0.6B", device="cpu", revision="main")
    assert asked == [("Qwen/Qwen3-Reranker-0.6B", "main")]
    assert scorer.info.name == "Qwen/Qwen3-Reranker-0.6B"


def test_an_unreachable_hub_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("connection refused\nand much more")

    monkeypatch.setattr(model, "snapshot_download", fail)
    message = refused("Qwen/Qwen3-Reranker-4B")
    assert "HF_ENDPOINT" in message
    assert "connection refused" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"model_type": "qwen2"}, "Qwen3-Reranker (0.6B, 4B, 8B) only"),
        ({"architectures": ["Qwen3ForSequenceClassification"]}, "converted model"),
        ({"use_sliding_window": True}, "sliding"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}, "model_type": "evil"}, "model_type is 'evil'"),
    ],
)
def test_another_architecture_is_refused_before_anything_is_built(
    copy: Path, values: dict[str, object], words: str
) -> None:
    change(copy, **values)
    (copy / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert words in refused(copy)


def test_remote_code_beside_a_right_checkpoint_does_not_run(copy: Path) -> None:
    change(copy, auto_map={"AutoModelForCausalLM": "evil.Model", "AutoConfig": "evil.Config"})
    (copy / "evil.py").write_text("raise SystemExit('remote code ran')")
    assert len(Scorer.load(copy, device="cpu").rerank("a", ["b"])) == 1


def test_broken_files_are_named(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "broken or half downloaded" in refused(copy)
    (copy / "config.json").write_text("{")
    assert "not JSON" in refused(copy)


def test_weights_that_do_not_fit_are_an_error_with_figures(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "parameters", lambda path: 4 * 10**12)
    message = refused(model_path, precision="bfloat16", max_memory_percentage=50)
    assert "7450.6 GiB in bfloat16" in message
    assert "MAX_MEMORY_PERCENTAGE=50" in message


def test_parameters_are_counted_from_all_shards(tmp_path: Path) -> None:
    whole, shards = make_model(tmp_path / "a"), make_model(tmp_path / "b", shards=True)
    assert len(list(shards.glob("*.safetensors"))) > 1
    assert parameters(whole) == parameters(shards) > 100_000


def test_a_folder_is_taken_as_it_is(model_path: Path) -> None:
    assert locate(str(model_path)) == model_path
