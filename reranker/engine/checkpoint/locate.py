"""Find a checkpoint: a folder as it is, a folder of the hub's cache by its snapshot, a hub name by download."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
"""What is downloaded: weights, settings, both forms of the tokenizer, the sentence-transformers layout."""
LFS_POINTER = b"version https://git-lfs"
_DOWNLOAD = (
    "download it first, for example `hf download Qwen/Qwen3-Reranker-4B --local-dir {path}` "
    "or `modelscope download --model Qwen/Qwen3-Reranker-4B --local_dir {path}`"
)
_AGAIN = "download the checkpoint again"
_ORIGINAL = "use a checkpoint with *.safetensors, such as Qwen/Qwen3-Reranker-4B"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_READ = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "modules.json"),
    *("config_sentence_transformers.json", "sentence_bert_config.json", "model-*-of-*.safetensors"),
)
"""Names and patterns of the files that loading opens."""
_PICKLES = f"pickles are not read, because loading one runs code: {_ORIGINAL}, or convert it with save_pretrained"
_OTHER_FORMATS = {
    "*.gguf": f"GGUF is not read: {_ORIGINAL} and MODEL_PRECISION=int8 on a CPU or float8 on a GPU",
    "*.onnx": f"ONNX is not read: {_ORIGINAL}",
    "onnx/*.onnx": f"ONNX is not read: {_ORIGINAL}",
    "openvino*.xml": f"OpenVINO is not read: {_ORIGINAL}",
    "*.h5": f"TensorFlow's weights are not read: {_ORIGINAL}",
    "*.msgpack": f"Flax's weights are not read: {_ORIGINAL}",
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt"), _PICKLES),
}
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")


def locate(name: str, revision: str | None = None) -> Path:
    """Return the folder of a checkpoint, with all files that loading needs.

    Args:
        name: a folder, a folder `models--X--Y` of the hub's cache, or a hub name, which is downloaded or found in the
            cache.
        revision: branch, tag or commit of a hub name or of a cache folder; None: the newest.

    Raises:
        ModelLoadError: the folder does not exist or is incomplete, holds another format, or the hub has no such model.
    """
    try:
        return _locate(name, revision)
    except OSError as error:
        file = error.filename or name[:200]
        raise ModelLoadError(
            f"cannot read {file}: {error.strerror} (this process runs as uid {os.getuid()})"
        ) from error
    except (RuntimeError, ValueError) as error:  # a home folder of nobody, a zero byte, a reference that is no text
        raise ModelLoadError(f"{name[:200]!r} is no model folder: {error}") from error


def _locate(name: str, revision: str | None) -> Path:
    path = Path(name).expanduser()
    if path.is_file():
        other = _other_format(path.parent, path.name)
        raise ModelLoadError(
            f"{path} is a file: set MODEL_NAME_OR_PATH to the folder that holds config.json and *.safetensors"
            + (f"; {other}" if other else "")
        )
    if path.is_dir():
        if path.name.startswith("models--") and (path / "snapshots").is_dir():
            path = _snapshot(path, revision)
        elif revision:
            raise ModelLoadError(
                f"MODEL_REVISION={revision} cannot be honoured: {path} is a folder and not a hub name; leave it empty"
            )
        check_files(path, _DOWNLOAD.format(path=path))
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith(".") or path.parent.is_dir():
        raise ModelLoadError(f"the model folder {path} does not exist: {_DOWNLOAD.format(path=path)}")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> Path:
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:  # every failure of the hub's client means the same here: no model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(
            f"cannot download {name}: {reason[0]} (behind a firewall set HF_ENDPOINT to a mirror, "
            f"or download it elsewhere and set MODEL_NAME_OR_PATH to the folder)"
        ) from error
    advice = f"download the whole repository, `hf download {name}`"
    if constants.HF_HUB_OFFLINE:
        advice += ", with network access: HF_HUB_OFFLINE is set, so nothing is fetched now"
    else:
        advice += "; if it has no such file, it holds another format (GGUF, ONNX and pickles are not read)"
    check_files(path, advice)
    return path


def _snapshot(path: Path, revision: str | None) -> Path:
    """Return the snapshot that `revision` or else the branch main names, or else the newest one."""
    snapshots = sorted((p for p in (path / "snapshots").iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    reference = path / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    chosen = [p for p in snapshots if p.name == commit]
    if not chosen and (revision or not snapshots):
        names = ", ".join(p.name for p in snapshots) or "none"
        target = f"MODEL_REVISION={revision}" if revision else "a snapshot"
        raise ModelLoadError(f"{path} does not hold {target} (snapshots: {names}): download it again")
    snapshot = (chosen or snapshots)[-1]
    logger.info("%s is a folder of the hub's cache: serving its snapshot %s", path, snapshot.name)
    return snapshot


def check_files(path: Path, advice: str) -> None:
    """Refuse a folder in which a file is missing, is a pointer or a dead link, or has a format that is not read.

    Args:
        path: the folder.
        advice: what to do where something was never downloaded.

    Raises:
        ModelLoadError: names the file and the way out.
    """
    for file in sorted(file for file in path.iterdir() if any(fnmatch(file.name, pattern) for pattern in _READ)):
        _check_file(path, file)
    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        raise ModelLoadError(f"{path} holds no config.json{_without_config(path, advice)}")
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise ModelLoadError(f"{path} holds no *.safetensors: {_other_format(path) or advice}")
    if not (path / "model.safetensors").is_file() and not (path / "model.safetensors.index.json").is_file():
        many = len(shards) > 1 or "-of-" in shards[0].name
        raise ModelLoadError(
            f"{path} holds {shards[0].name}, but neither model.safetensors nor model.safetensors.index.json: "
            + (f"the index of the shards is missing, {_AGAIN}" if many else "rename it if it is the whole model")
        )
    if not (path / "tokenizer.json").is_file():
        absent = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
        if absent:
            raise ModelLoadError(f"{path} holds no tokenizer (no tokenizer.json, no {absent[0]}): {advice}")


def _check_file(path: Path, file: Path) -> None:
    if file.is_symlink() and not file.exists():
        raise ModelLoadError(
            f"{file} is a link to {os.readlink(file)}, which does not exist here: mount or copy the whole cache "
            f"folder (with its blobs), not the snapshot alone"
        )
    if file.is_dir():
        raise ModelLoadError(f"{file} is a folder and not a file: look at what is mounted there")
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ModelLoadError(
                f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull` in {path}, or {_AGAIN}"
            )


def _without_config(path: Path, advice: str) -> str:
    """Return what the folder holds in place of config.json, and what to do."""
    inner = [
        folder
        for folder in _folders(path, "*", "snapshots/*")
        if os.path.isfile(folder / "config.json") and any(folder.glob("*.safetensors"))
    ]
    if inner and not (path / "modules.json").is_file():
        names = ", ".join(str(folder) for folder in inner[-3:])
        return f", but {names} {'does' if len(inner) == 1 else 'do'}: set MODEL_NAME_OR_PATH to that folder"
    return f": {_other_format(path) or advice}"


def _folders(path: Path, *patterns: str) -> Iterable[Path]:
    """Return the folders inside a folder, oldest first; one that cannot be entered is none."""
    folders = [folder for pattern in patterns for folder in path.glob(pattern) if os.path.isdir(folder)]
    return sorted(folders, key=lambda folder: folder.stat().st_mtime)


def _refuse_adapter(path: Path) -> None:
    """Refuse a LoRA adapter: it changes the scores of the weights beside it, or has no weights of its own."""
    advice = "merge it into its base model first (peft: model.merge_and_unload().save_pretrained(folder))"
    for folder in (path, *_folders(path, "*")):
        file = next((name for name in _ADAPTER_FILES if os.path.exists(folder / name)), None)
        if file and folder == path:
            raise ModelLoadError(f"{path / file} is a LoRA adapter, which is not applied: {advice}")
        if file:
            logger.warning("the LoRA adapter in %s is not applied: %s", folder, advice)


def _other_format(path: Path, name: str = "") -> str:
    """Return which other format a folder (or its file `name`) holds, and what to do; empty if it holds none."""
    for pattern, advice in _OTHER_FORMATS.items():
        for file in sorted(path.glob(pattern)):
            if name in ("", file.name) and not _TRAINING_STATE.fullmatch(file.name):
                return f"it holds {file.relative_to(path)}, and {advice}"
    return ""
