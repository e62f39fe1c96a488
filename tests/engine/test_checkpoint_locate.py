from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils._paths import filter_repo_objects

from reranker import ModelLoadError, Scorer
from reranker.engine.checkpoint import locate as module
from reranker.engine.checkpoint.locate import FILES, locate
from reranker.root import ROOT
from tests.cli.command import run_process

ORIGINAL = """.gitattributes LICENSE README.md config.json generation_config.json merges.txt
model-00001-of-00002.safetensors model.safetensors.index.json
tokenizer.json tokenizer_config.json vocab.json modules.json 1_LogitScore/config.json
config_sentence_transformers.json sentence_bert_config.json chat_template.jinja adapter_config.json""".split()


def refused(path: Path | str, revision: str | None = None) -> str:
    with pytest.raises(ModelLoadError) as caught:
        locate(str(path), revision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def cache(model_path: Path, tmp_path: Path) -> Path:
    """A folder of the hub's cache in the layout of the hub's client: blobs, links to them, and the branch main."""
    root = tmp_path / "hub" / "models--Qwen--Qwen3-Reranker-0.6B"
    for commit in ("aaaa", "bbbb"):
        (root / "snapshots" / commit).mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("aaaa")
    for file in model_path.iterdir():
        shutil.copy(file, root / "blobs" / file.name)
        for commit in ("aaaa", "bbbb"):
            (root / "snapshots" / commit / file.name).symlink_to(f"../../blobs/{file.name}")
    os.utime(root / "snapshots" / "aaaa", (1, 1))
    return root


@pytest.mark.parametrize("name", ["./models/none", "/nonexistent/model", "models/Qwen3-Reranker-4B", "~/none/at/all"])
def test_a_missing_folder_says_how_to_download(name: str) -> None:
    message = refused(name)
    assert "does not exist" in message
    assert "hf download Qwen/Qwen3-Reranker-4B --local-dir" in message
    assert "modelscope download" in message


@pytest.mark.parametrize("name", ["bge-reranker-v2-m3", "Qwen3-Reranker-0.6B"])
def test_a_missing_folder_with_the_name_of_a_model_names_that_one(name: str) -> None:
    owner = "BAAI" if name.startswith("bge") else "Qwen"
    assert f"download it first, `hf download {owner}/{name} --local-dir models/{name}` or" in refused(f"models/{name}")


@pytest.mark.parametrize(
    ("folder", "config", "advice"),
    [
        ("bge-reranker-base", "{}", "the whole repository, `hf download BAAI/bge-reranker-base --local-dir"),
        (
            "mine",
            '{"model_type": "bert"}',
            "the whole repository of this bert model, `hf download OWNER/NAME --local-dir",
        ),
        ("mine", "[]", "the whole repository of the model, `hf download OWNER/NAME --local-dir"),
        ("models--A--b--c/snapshots/0f", "{}", "the whole repository, `hf download A/b--c`"),
    ],
)
def test_a_foreign_folder_without_a_tokenizer_is_not_told_to_download_another_model(
    folder: str, config: str, advice: str, tmp_path: Path
) -> None:
    path = tmp_path / folder
    path.mkdir(parents=True)
    (path / "config.json").write_text(config)
    (path / "model.safetensors").write_bytes(b"")
    for name in (path, path.parent.parent) if "snapshots" in folder else [path]:
        message = refused(name)
        assert f"holds no tokenizer (no tokenizer.json, no vocab.json): download {advice}" in message
        assert "Qwen" not in message


def test_a_folder_is_taken_as_it_is(model_path: Path) -> None:
    assert locate(str(model_path)).path == model_path


def test_a_revision_of_a_folder_is_refused(model_path: Path) -> None:
    assert "MODEL_REVISION=main cannot be honoured" in refused(model_path, "main")


@pytest.fixture
def readable(model_path: Path) -> Iterator[Path]:
    """A copy that another user can read, in a folder that another user can enter."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        copy = Path(shutil.copytree(model_path, Path(folder) / "model"))
        for path in [copy, *copy.iterdir()]:
            path.chmod(0o755)
        yield copy


@contextmanager
def another_user() -> Iterator[None]:
    """Another user than root, who may read every file."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "."])
def test_what_may_not_be_read_is_named(readable: Path, name: str) -> None:
    (readable / name).chmod(0)
    with another_user():
        message = refused(readable)
    assert "Permission denied (this process runs as uid" in message
    (readable / name).chmod(0o755)


def test_a_folder_beside_the_files_that_may_not_be_entered_is_left_alone(readable: Path) -> None:
    """Such as lost+found at the root of a volume."""
    (readable / "lost+found").mkdir(mode=0)
    (readable / "secret.json").touch(mode=0)
    with another_user():
        assert locate(str(readable)).path == readable
    (readable / "lost+found").chmod(0o755)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-this-name/model", "a\0b", "https:/x/y/z"])
def test_what_is_no_name_at_all_is_one_line(name: str) -> None:
    assert len(refused(name)) < 6000


def test_a_reference_that_is_no_text_is_one_line(cache: Path) -> None:
    (cache / "refs" / "main").write_bytes(b"\xff\xfe")
    assert "is not a model folder" in refused(cache)


@pytest.mark.parametrize("name", ["model-Q8_0.gguf", "model.safetensors"])
def test_a_file_is_no_model(model_path: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"x")
    message = refused(file)
    assert "is a file: set MODEL_NAME_OR_PATH to the folder" in message
    assert ("GGUF is not read" in message) == name.endswith("gguf")


@pytest.mark.parametrize(
    ("revision", "commit"), [(None, "aaaa"), ("main", "aaaa"), ("bbbb", "bbbb")], ids=["newest", "branch", "commit"]
)
def test_a_cache_folder_is_served_from_its_snapshot(
    cache: Path, revision: str | None, commit: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert locate(str(cache), revision).path == cache / "snapshots" / commit
    assert commit in caplog.text


def test_a_cache_folder_without_its_branch_is_served_from_the_newest_snapshot(cache: Path) -> None:
    shutil.rmtree(cache / "refs")
    assert locate(str(cache)).path == cache / "snapshots" / "bbbb"


def test_a_cache_folder_without_the_revision_names_what_it_holds(cache: Path) -> None:
    message = refused(cache, "v2")
    assert "MODEL_REVISION=v2" in message
    assert "aaaa, bbbb" in message
    shutil.rmtree(cache / "snapshots")
    (cache / "snapshots").mkdir()
    assert "snapshots: none" in refused(cache)


def test_a_snapshot_without_its_blobs_says_what_to_mount(cache: Path, tmp_path: Path) -> None:
    mounted = tmp_path / "mounted"
    shutil.copytree(cache / "snapshots" / "aaaa", mounted, symlinks=True)
    message = refused(mounted)
    assert "is a link to ../../blobs/" in message
    assert "mount or copy the whole cache folder" in message


def test_the_folder_above_checkpoints_names_them(model_path: Path, tmp_path: Path) -> None:
    for i, name in enumerate(("checkpoint-900", "checkpoint-1000")):
        shutil.copytree(model_path, tmp_path / "out" / name)
        os.utime(tmp_path / "out" / name, (i, i))
    (tmp_path / "out" / "logs").mkdir()
    (tmp_path / "out" / "logs" / "config.json").write_text("{}")
    message = refused(tmp_path / "out")
    assert f"{tmp_path / 'out' / 'checkpoint-900'}, {tmp_path / 'out' / 'checkpoint-1000'} do" in message


def test_the_name_of_the_demo_model_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a checkout `demo` is the folder that made the model; another folder of that name is any other."""
    monkeypatch.chdir(ROOT)
    assert "the bundled demo model is MODEL_NAME_OR_PATH without a value" in refused("demo")
    (tmp_path / "demo").mkdir()
    assert "bundled" not in refused(tmp_path / "demo")


@pytest.mark.parametrize(
    ("absent", "words"),
    [
        (["config.json"], "holds no config.json: download the whole repository"),
        (["model.safetensors"], "holds no *.safetensors: download the whole repository"),
        (["tokenizer.json"], "holds no tokenizer (no tokenizer.json, no vocab.json): download the whole"),
    ],
)
def test_half_a_download_without_a_network_is_named(
    cache: Path, monkeypatch: pytest.MonkeyPatch, absent: list[str], words: str
) -> None:
    """With the hub's own client."""
    for name in absent:
        (cache / "snapshots" / "aaaa" / name).unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache.parent))
    message = refused("Qwen/Qwen3-Reranker-0.6B")
    assert words in message
    assert "HF_HUB_OFFLINE is set" in message
    assert "`hf download Qwen/Qwen3-Reranker-0.6B`" in message


def test_a_whole_download_is_served_without_a_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache.parent))
    assert locate("Qwen/Qwen3-Reranker-0.6B").path == cache / "snapshots" / "aaaa"
    assert "cannot download Qwen/Qwen3-Reranker-4B" in refused("Qwen/Qwen3-Reranker-4B")


def test_half_a_download_is_one_line_of_the_command_line(cache: Path, tmp_path: Path) -> None:
    (cache / "snapshots" / "aaaa" / "config.json").unlink()
    env = {"HF_HUB_CACHE": str(cache.parent), "HF_HUB_OFFLINE": "1"}
    # In a process of its own: huggingface_hub reads its variables when it is imported.
    done = run_process("check", "--model", "Qwen/Qwen3-Reranker-0.6B", cwd=tmp_path, env=env)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "holds no config.json" in done.stderr.splitlines()[-1]


def test_everything_that_is_read_is_downloaded() -> None:
    downloaded = set(filter_repo_objects(ORIGINAL, allow_patterns=FILES))
    assert downloaded == set(ORIGINAL) - {".gitattributes", "LICENSE", "README.md"}
    others = ["pytorch_model.bin", "modeling.py", "model.onnx", "model.gguf", "onnx/model.onnx", "image.png"]
    assert not list(filter_repo_objects(others, allow_patterns=FILES))


def test_a_hub_name_is_downloaded_with_its_revision(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        calls.append((name, revision, allow_patterns))
        return str(model_path)

    monkeypatch.setattr(module, "snapshot_download", download)
    scorer = Scorer.load("Qwen/Qwen3-Reranker-0.6B", device="cpu", revision="main")
    assert calls == [("Qwen/Qwen3-Reranker-0.6B", "main", FILES)]
    assert scorer.info.name == "Qwen/Qwen3-Reranker-0.6B"


def test_an_unreachable_hub_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise OSError("connection refused\nand much more")

    monkeypatch.setattr(module, "snapshot_download", fail)
    message = refused("Qwen/Qwen3-Reranker-4B")
    assert "HF_ENDPOINT" in message
    assert "connection refused" in message
