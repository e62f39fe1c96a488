"""Find a checkpoint: a folder, a snapshot in a folder of the hub's cache, or a download by its hub name.

Each of the three may hold a LoRA adapter, whose base is in the same folder or is found by its name in the same way.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, snapshot_download

from reranker.engine.checkpoint.adapter import CONFIG, WEIGHTS, Adapter
from reranker.engine.checkpoint.files import AGAIN, refuse_if, refuse_pointer
from reranker.errors import ModelLoadError
from reranker.root import ROOT

logger = logging.getLogger(__name__)

FILES = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
"""Patterns to download: weights, settings, both forms of the tokenizer, the sentence-transformers layout."""
_OPENED = (
    *("config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json"),
    *("special_tokens_map.json", "chat_template.jinja", "chat_template.json", "modules.json"),
    *("config_sentence_transformers.json", "sentence_bert_config.json", "model-*-of-*.safetensors", CONFIG, WEIGHTS),
)
"""Patterns of the files that loading opens."""
_DOWNLOAD = "`hf download {name} --local-dir {path}` or `modelscope download --model {name} --local_dir {path}`"
_OWNERS = {"qwen3-reranker-": "Qwen", "bge-reranker-": "BAAI"}
"""The owner on both hubs, by the start of a model's name in lower case."""
_SAFETENSORS = "use a checkpoint of it with *.safetensors"
_PICKLE = f"pickles are not read, because loading one runs code: {_SAFETENSORS}, or convert it with save_pretrained"
_OTHER_FORMATS = {
    "*.gguf": f"GGUF is not read: {_SAFETENSORS} and MODEL_PRECISION=int8",
    "*.onnx": f"ONNX is not read: {_SAFETENSORS}",
    "onnx/*.onnx": f"ONNX is not read: {_SAFETENSORS}",
    "openvino*.xml": f"OpenVINO is not read: {_SAFETENSORS}",
    "*.h5": f"TensorFlow weights are not read: {_SAFETENSORS}",
    "*.msgpack": f"Flax weights are not read: {_SAFETENSORS}",
    **dict.fromkeys(("*.bin", "*.pt", "*.pth", "*.ckpt"), _PICKLE),
}
_TRAINING_STATE = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state|random_states).*")
_ADAPTER_FILES = (CONFIG, WEIGHTS, "adapter_model.bin")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")


class Located(NamedTuple):
    """A checkpoint whose files are there."""

    path: Path
    """The folder of config.json and the weights."""
    adapter: Adapter | None = None
    """The LoRA adapter that is merged into the weights."""

    @property
    def folders(self) -> list[Path]:
        """The folders whose files are read; a file of the first is read in place of one of the second."""
        own = [] if self.adapter is None or self.adapter.folder == self.path else [self.adapter.folder]
        return [*own, self.path]

    @property
    def files(self) -> list[Path]:
        """All files that may be read, in a fixed order."""
        return [file for folder in self.folders for file in sorted({f for p in FILES for f in folder.glob(p)})]


def locate(name: str, revision: str | None = None) -> Located:
    """Return the folder of a checkpoint, with all files that loading needs, and its adapter.

    Args:
        name: a folder, a folder `models--X--Y` of the hub's cache, or a hub name, downloaded unless the cache has it.
        revision: branch, tag or commit of a hub name or of a cache folder; None: the newest.

    Raises:
        ModelLoadError: the folder does not exist, is incomplete or holds another format, or the hub has no such model;
            or its adapter is not one that is merged here.
    """
    try:
        path, advice = _find(name, revision)
        if any(os.path.lexists(path / file) for file in _ADAPTER_FILES):
            located = _with_adapter(path, advice)
        else:
            _check_files(path, advice)
            located = Located(path)
        _warn_of_adapters(located)
        return located
    except OSError as error:
        problem = f"cannot read {error.filename or name[:200]}: {error.strerror}"
        raise ModelLoadError(f"{problem} (this process runs as uid {os.getuid()})") from error
    except (RuntimeError, ValueError) as error:  # an unknown user's home, a zero byte, a reference that is not text
        raise ModelLoadError(f"{name[:200]!r} is not a model folder: {error}") from error


def _find(name: str, revision: str | None) -> tuple[Path, str]:
    """Return the folder, and the advice for a file that is missing in it."""
    path = Path(name).expanduser()
    if path.is_file():
        problem = f"{path} is a file: set MODEL_NAME_OR_PATH to the folder that holds config.json and *.safetensors"
        raise ModelLoadError("; ".join(filter(None, (problem, _other_format(path.parent, path.name)))))
    if path.is_dir():
        if path.name.startswith("models--") and (path / "snapshots").is_dir():
            path, revision = _snapshot(path, revision), None
        problem = f"{path} is a folder and not a hub name; leave it empty"
        refuse_if(revision, f"MODEL_REVISION={revision} cannot be honoured: {problem}")
        return path, _missing_file(path)
    hub_name = _HUB_NAME.fullmatch(name) and not path.parent.is_dir()
    if not hub_name:
        known = _known_name(path)
        download = _DOWNLOAD.format(name=known or "Qwen/Qwen3-Reranker-4B", path=path)
        example = "" if known else "for example "
        raise ModelLoadError(f"the model folder {path} does not exist: download it first, {example}{download}")
    return _download(name, revision)


def _known_name(path: Path) -> str:
    """Return the hub name of the model that a folder is named after; '' if its owner is not known."""
    owners = (owner for start, owner in _OWNERS.items() if path.name.lower().startswith(start))
    return f"{owner}/{path.name}" if (owner := next(owners, "")) else ""


def _missing_file(path: Path) -> str:
    """Return the advice for a folder without one of its files: where its own model comes from, not another one."""
    cache = path.parent.parent.name
    if path.parent.name == "snapshots" and cache.startswith("models--"):
        return f"download the whole repository, `hf download {cache.removeprefix('models--').replace('--', '/', 1)}`"
    if known := _known_name(path):
        return f"download the whole repository, {_DOWNLOAD.format(name=known, path=path)}"
    try:
        kind = json.loads((path / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError, AttributeError):  # `_check_files` names it
        kind = None
    model = f"this {kind} model" if isinstance(kind, str) else "the model"
    return f"download the whole repository of {model}, `hf download OWNER/NAME --local-dir {path}`"


def _with_adapter(folder: Path, advice: str) -> Located:
    """Return an adapter and its base: the weights beside it, else those that its adapter_config.json names."""
    _check_readable(folder)
    adapter = Adapter.read(folder)
    if _weights(folder):
        _check_files(folder, advice)
        return Located(folder, adapter)
    try:
        path, advice = _find_base(adapter)
        problem = f"it is a LoRA adapter too, in {path}: merge one of them into its own base first"
        refuse_if(any(os.path.exists(path / file) for file in _ADAPTER_FILES), problem)
        _check_files(path, advice)
    except ModelLoadError as error:
        raise ModelLoadError(f"the base of the LoRA adapter in {folder} cannot be used: {error}") from error
    return Located(path, adapter)


def _find_base(adapter: Adapter) -> tuple[Path, str]:
    """Find the base by its name: a folder, also relative to that of the adapter, or a hub name."""
    file, name = adapter.folder / CONFIG, adapter.base
    write = "write its folder or hub name there, or put the files of the adapter beside those of the base"
    refuse_if(not name, f"{file} names none (base_model_name_or_path): {write}")
    for path in ((adapter.folder / name).resolve(), Path(name).expanduser()):
        if path.is_dir():
            in_cache = path.name.startswith("models--")
            if adapter.revision and not in_cache:
                logger.warning("%s asks for the revision %s of its base, and %s has none", file, adapter.revision, path)
            return _find(str(path), adapter.revision if in_cache else None)
    refuse_if(not _HUB_NAME.fullmatch(name), f"{file} names {name[:200]}, which does not exist here: {write}")
    return _download(name, adapter.revision, f"base_model_name_or_path in {file}")


def _download(name: str, revision: str | None, setting: str = "MODEL_NAME_OR_PATH") -> tuple[Path, str]:
    try:
        path = Path(snapshot_download(name, revision=revision, allow_patterns=FILES))
    except Exception as error:  # the hub's client raises many types, and each means that there is no model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(
            f"cannot download {name}: {reason[0]} (behind a firewall set HF_ENDPOINT to a mirror, "
            f"or download it elsewhere and write its folder into {setting})"
        ) from error
    advice = f"download the whole repository, `hf download {name}`"
    if constants.HF_HUB_OFFLINE:
        advice += ", with network access: HF_HUB_OFFLINE is set, so nothing is fetched now"
    else:
        advice += "; if it has no such file, it holds another format (GGUF, ONNX and pickles are not read)"
    return path, advice


def _snapshot(path: Path, revision: str | None) -> Path:
    """Return the snapshot of `revision`, else that of the branch main, else the newest."""
    snapshots = _oldest_first((path / "snapshots").iterdir())
    reference = path / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    chosen = [p for p in snapshots if p.name == commit]
    if not chosen and (revision or not snapshots):
        names = ", ".join(p.name for p in snapshots) or "none"
        target = f"MODEL_REVISION={revision}" if revision else "a snapshot"
        raise ModelLoadError(f"{path} does not hold {target} (snapshots: {names}): {AGAIN}")
    snapshot = (chosen or snapshots)[-1]
    logger.info("%s is a folder of the hub's cache: serving its snapshot %s", path, snapshot.name)
    return snapshot


def _check_files(path: Path, advice: str) -> None:
    """Refuse a folder with a missing or unreadable file, or in another format; `advice` is for a missing file."""
    _check_readable(path)
    present = {file.name for file in path.iterdir() if os.path.isfile(file)}
    shards = _weights(path)
    if "config.json" not in present:
        raise ModelLoadError(f"{path} holds no config.json{_without_config(path, advice)}")
    if not shards:
        raise ModelLoadError(f"{path} holds no *.safetensors: {_other_format(path) or advice}")
    many = len(shards) > 1 or "-of-" in shards[0].name
    cause = f"the index of the shards is missing, {AGAIN}" if many else "rename it if it is the whole model"
    refuse_if(
        present.isdisjoint({"model.safetensors", "model.safetensors.index.json"}),
        f"{path} holds {shards[0].name}, but neither model.safetensors nor model.safetensors.index.json: {cause}",
    )
    absent = next((name for name in ("vocab.json", "merges.txt") if name not in present), None)
    missing = absent and "tokenizer.json" not in present
    refuse_if(missing, f"{path} holds no tokenizer (no tokenizer.json, no {absent}): {advice}")


def _weights(path: Path) -> list[Path]:
    """Return the *.safetensors of a folder that are not an adapter's."""
    return [file for file in sorted(path.glob("*.safetensors")) if file.name != WEIGHTS]


def _check_readable(path: Path) -> None:
    for file in sorted(file for file in path.iterdir() if any(fnmatch(file.name, pattern) for pattern in _OPENED)):
        _check_file(file)


def _check_file(file: Path) -> None:
    if file.is_symlink() and not file.exists():
        fix = "mount or copy the whole cache folder (with its blobs), not the snapshot alone"
        raise ModelLoadError(f"{file} is a link to {os.readlink(file)}, which does not exist here: {fix}")
    refuse_if(file.is_dir(), f"{file} is a folder and not a file: look at what is mounted there")
    with file.open("rb") as opened:
        refuse_pointer(file, opened.read(100))


def _without_config(path: Path, advice: str) -> str:
    """Return where else the configuration or which other format the folder holds, and the way out."""
    if path.resolve() == ROOT / "demo":  # the folder that made the model
        return ": the bundled demo model is MODEL_NAME_OR_PATH without a value (on the command line --model '')"
    inner = [
        folder
        for folder in _oldest_first([*path.glob("*"), *path.glob("snapshots/*")])
        if os.path.isfile(folder / CONFIG)
        or (os.path.isfile(folder / "config.json") and any(folder.glob("*.safetensors")))
    ]
    if inner and not (path / "modules.json").is_file():
        names = ", ".join(str(folder) for folder in inner[-3:])
        return f", but {names} {'does' if len(inner) == 1 else 'do'}: set MODEL_NAME_OR_PATH to that folder"
    return f": {_other_format(path) or advice}"


def _oldest_first(paths: Iterable[Path]) -> list[Path]:
    """Return the folders among the paths by their time of change, without those that cannot be entered."""
    return sorted((path for path in paths if os.path.isdir(path)), key=lambda path: path.stat().st_mtime)


def _warn_of_adapters(located: Located) -> None:
    """Warn of other adapters in folders beside the weights, such as the checkpoints of a training."""
    read = [folder.resolve() for folder in located.folders]
    for folder in _oldest_first(folder for path in located.folders for folder in path.glob("*")):
        if folder.resolve() not in read and any(os.path.exists(folder / name) for name in _ADAPTER_FILES):
            logger.warning("the LoRA adapter in %s is not applied: to serve it, set MODEL_NAME_OR_PATH to it", folder)


def _other_format(path: Path, name: str = "") -> str:
    """Return the unsupported format of a folder, or of its file `name`, and the way out; '' if it has none."""
    for pattern, advice in _OTHER_FORMATS.items():
        for file in sorted(path.glob(pattern)):
            if name in ("", file.name) and not _TRAINING_STATE.fullmatch(file.name):
                return f"it holds {file.relative_to(path)}, and {advice}"
    return ""
