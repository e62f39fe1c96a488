"""Find a checkpoint: a folder as it is, a folder of the hub's cache by its snapshot, a hub name by download."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path

from huggingface_hub import constants, snapshot_download

from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
"""What is read of a repository: weights, settings, both forms of the tokenizer, the sentence-transformers layout."""
_DOWNLOAD = (
    "download it first, for example `hf download Qwen/Qwen3-Reranker-4B --local-dir {path}` "
    "or `modelscope download --model Qwen/Qwen3-Reranker-4B --local_dir {path}`"
)
_AGAIN = "download the checkpoint again"
_ORIGINAL = "use a checkpoint with *.safetensors, such as Qwen/Qwen3-Reranker-4B"
_LFS = b"version https://git-lfs"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_OTHER_FORMATS = {
    "*.gguf": f"GGUF is not read: {_ORIGINAL} and MODEL_PRECISION=int8 on a CPU or float8 on a GPU",
    "*.onnx": f"ONNX is not read: {_ORIGINAL}",
    "onnx/*.onnx": f"ONNX is not read: {_ORIGINAL}",
    "openvino*.xml": f"OpenVINO is not read: {_ORIGINAL}",
    "*.bin": f"pickles are not read, because loading one runs code: {_ORIGINAL}, or convert it with save_pretrained",
    "*.pt": f"pickles are not read, because loading one runs code: {_ORIGINAL}, or convert it with save_pretrained",
    "*.pth": f"pickles are not read, because loading one runs code: {_ORIGINAL}, or convert it with save_pretrained",
    "*.ckpt": f"pickles are not read, because loading one runs code: {_ORIGINAL}, or convert it with save_pretrained",
    "*.h5": f"TensorFlow's weights are not read: {_ORIGINAL}",
    "*.msgpack": f"Flax's weights are not read: {_ORIGINAL}",
}


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint, with all files that loading needs.

    Args:
        name: a folder, a folder `models--X--Y` of the hub's cache, or a hub name, which is downloaded or found in the
            cache.
        revision: branch, tag or commit of a hub name or of a cache folder; None: the newest.

    Raises:
        ModelLoadError: the folder does not exist or is incomplete, holds another format, or the hub has no such model.
    """
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelLoadError(
            f"{path} is a file: set MODEL_NAME_OR_PATH to the folder that holds config.json and *.safetensors"
            + (f"; {other}" if (other := _other_format(path.parent, path.name)) else "")
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
    offline = (
        "with network access: HF_HUB_OFFLINE is set, so nothing is fetched now" if constants.HF_HUB_OFFLINE else ""
    )
    check_files(path, f"download the whole repository, `hf download {name}`{offline and ', '}{offline}")
    return path


def _snapshot(path: Path, revision: str | None) -> Path:
    """The snapshot of a cache folder that `revision` or else the branch main names, or else the newest one."""
    snapshots = sorted((p for p in (path / "snapshots").iterdir() if p.is_dir()), key=lambda p: p.stat().st_mtime)
    ref = path / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision
    chosen = [p for p in snapshots if p.name == commit]
    if not chosen and (revision or not snapshots):
        there = ", ".join(p.name for p in snapshots) or "none"
        wanted = f"MODEL_REVISION={revision}" if revision else "a snapshot"
        raise ModelLoadError(f"{path} does not hold {wanted} (snapshots: {there}): download it again")
    found = (chosen or snapshots)[-1]
    logger.info("%s is a folder of the hub's cache: serving its snapshot %s", path, found.name)
    return found


def check_files(path: Path, way_out: str) -> None:
    """Refuse a folder in which a file is missing, is a pointer or a dead link, or has a format that is not read.

    Args:
        path: the folder.
        way_out: what to do where something was never downloaded.

    Raises:
        ModelLoadError: names the file and the way out.
    """
    for file in sorted({file for pattern in FILES for file in path.glob(pattern)}):
        if file.is_symlink() and not file.exists():
            raise ModelLoadError(
                f"{file} is a link to {os.readlink(file)}, which does not exist here: mount or copy the whole cache "
                f"folder (with its blobs), not the snapshot alone"
            )
        if file.is_file() and _begins(file, _LFS):
            raise ModelLoadError(
                f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull` in {path}, or {_AGAIN}"
            )
    _refuse_adapter(path)
    if not (path / "config.json").is_file():
        inner = sorted(file.parent for pattern in ("*", "snapshots/*") for file in path.glob(f"{pattern}/config.json"))
        other = _other_format(path)
        if other or not inner:
            raise ModelLoadError(f"{path} holds no config.json: {other or way_out}")
        raise ModelLoadError(
            f"{path} holds no config.json, but {inner[-1]} does: set MODEL_NAME_OR_PATH to that folder"
        )
    weights = sorted(path.glob("*.safetensors"))
    if not weights:
        raise ModelLoadError(f"{path} holds no *.safetensors: {_other_format(path) or way_out}")
    if not (path / "model.safetensors").is_file() and not (path / "model.safetensors.index.json").is_file():
        raise ModelLoadError(
            f"{path} holds {weights[0].name}, but neither model.safetensors nor model.safetensors.index.json: "
            f"{'the index of the shards is missing, ' if len(weights) > 1 else ''}{_AGAIN}"
        )
    if not (path / "tokenizer.json").is_file():
        absent = [name for name in ("vocab.json", "merges.txt") if not (path / name).is_file()]
        if absent:
            raise ModelLoadError(f"{path} holds no tokenizer (no tokenizer.json, no {absent[0]}): {way_out}")


def _begins(file: Path, mark: bytes) -> bool:
    with file.open("rb") as opened:
        return opened.read(len(mark)) == mark


def _refuse_adapter(path: Path) -> None:
    """A LoRA adapter changes the scores of the weights that it lies beside, or has no weights of its own."""
    advice = "merge it into its base model first (peft: model.merge_and_unload().save_pretrained(folder))"
    for folder in (path, *sorted(p for p in path.glob("*") if p.is_dir())):
        found = next((f for f in _ADAPTER_FILES if (folder / f).exists()), None)
        if found and folder == path:
            raise ModelLoadError(f"{path / found} is a LoRA adapter, which is not applied: {advice}")
        if found:
            logger.warning("the LoRA adapter in %s is not applied: %s", folder, advice)


def _other_format(path: Path, name: str = "") -> str:
    """Which other format a folder (or its file `name`) holds, and what to do; nothing where it holds none."""
    for pattern, advice in _OTHER_FORMATS.items():
        for file in sorted(path.glob(pattern)):
            if name in ("", file.name) and file.name not in ("training_args.bin", "optimizer.pt", "scheduler.pt"):
                return f"it holds {file.relative_to(path)}, and {advice}"
    return ""
