"""The weights of a checkpoint by name: those in its files, with an adapter merged into them or scales multiplied."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from reranker.engine.checkpoint.files import AGAIN, read_json, refuse_if
from reranker.engine.checkpoint.scales import Rounded, Scheme
from reranker.engine.checkpoint.tensors import FLOATS, Stored, opened, read_header
from reranker.errors import ModelLoadError

if TYPE_CHECKING:
    from reranker.engine.checkpoint.adapter import Adapter

EMBEDDING, HEAD, SCORE_HEAD = "model.embed_tokens.weight", "lm_head.weight", "score.weight"


class Names(NamedTuple):
    """The weights of a model that are quantised, and those that stay as narrow as they are stored."""

    projections: tuple[tuple[str, ...], ...]
    """Last parts of the names of a layer's projections; those in one tuple are joined."""
    embeddings: tuple[str, ...]


DECODER = Names(
    (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    (EMBEDDING,),
)


class Weights:
    """The tensors of a checkpoint by name, an adapter merged into them; the headers are read once, here.

    Attributes:
        path: the folder.
        adapter: a LoRA adapter that is merged into the weights.
        stored: every tensor in the files; those that the adapter has saved are as the adapter's file has them.
            Quantised weights are float32 here, and their scales are left out.
        files: the file of every tensor of the checkpoint itself.
        layout: the quantised weights and their scales; None without any.

    Args:
        path: the folder.
        adapter: the adapter.
        scheme: how config.json says that the weights are quantised.

    Raises:
        ModelLoadError: a file is broken or missing, or quantised weights and scales do not fit together.
    """

    def __init__(self, path: Path, adapter: Adapter | None = None, scheme: Scheme | None = None) -> None:
        self.path = path
        self.adapter = adapter
        self.stored: dict[str, Stored] = {}
        self.files: dict[str, Path] = {}
        self._states: dict[Path, tuple[int, int]] = {}
        for file in weight_files(path):
            self._states[file] = _state(file)
            header = read_header(file)
            twice = next(iter(header.keys() & self.files.keys()), "")
            refuse_if(twice, f"{twice} is in {file} and in {self.files.get(twice)}: {AGAIN}")
            self.stored |= header
            self.files |= dict.fromkeys(header, file)
        self.layout = None if scheme is None else scheme.layout(path, self.stored)
        if self.layout is not None:
            self.stored = self.layout.widened(self.stored)
        if adapter is not None:
            self.stored |= {name: adapter.stored[tensor] for name, tensor in adapter.saved.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type in which most values are stored."""
        counts: Counter[torch.dtype] = Counter()
        for stored in self.stored.values():
            if stored.dtype in FLOATS:
                counts[FLOATS[stored.dtype]] += stored.numel
        return counts.most_common(1)[0][0]

    @property
    def precision(self) -> torch.dtype | None:
        """int8 or float8, if the projections can be multiplied as they are stored; None otherwise."""
        return None if self.layout is None or self.adapter is not None else self.layout.precision

    def source(self, name: str) -> str:
        """Return the name under which a tensor is stored: of a tied pair, the other one's if only that is."""
        twin = {EMBEDDING: HEAD, HEAD: EMBEDDING}.get(name, name)
        return name if name in self.files else twin

    def tensor(self, name: str) -> Tensor:
        """Return a tensor on the CPU: a quantised weight, or one that an adapter changes, as float32; others as stored.

        As stored it is a view of the file, which is closed and stays mapped as long as the view exists: only rows that
        are used are read, and the system may drop them from memory. An adapter of one of two tied tensors leaves the
        other one as it is.

        Raises:
            ModelLoadError: the file is broken, or not the one whose header was read.
        """
        if self.adapter is None:
            return self.unmerged(name)
        return self.adapter.merge(name, self.unmerged)

    def unmerged(self, name: str) -> Tensor:
        """Return a tensor as stored in the checkpoint's own files."""
        source = self.source(name)
        if self.layout is not None and source in self.layout.weights:
            return self.layout.widen(source, self._read)
        return self._read(source)

    def rounded(self, *names: str) -> Rounded | None:
        """Return projections of the same input as they are stored, one below the other; see `Layout.rounded`."""
        if self.layout is None or self.adapter is not None:
            return None
        return self.layout.rounded(names, self._read)

    def is_wide(self, name: str) -> bool:
        """Whether a weight is stored without scales."""
        return self.layout is None or name not in self.layout.weights

    def _read(self, name: str) -> Tensor:
        file = self.files[name]
        with opened(file) as tensors:
            changed = _state(file) != self._states[file]
            refuse_if(changed, f"{file} was replaced while it was read: load it again when all files are there")
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def not_finite(self) -> str | None:
        """Return the name and file of the first tensor with a NaN or an infinity; None without any. Reads all."""
        for name in sorted(self.files, key=lambda name: (self.files[name], name)):
            floats = name in self.stored and self.stored[name].dtype in FLOATS  # scales are checked as products
            if floats and not torch.isfinite(self.unmerged(name)).all():
                return f"{name} in {self.files[name]}"
        return None if self.adapter is None else self.adapter.not_finite()


def _state(file: Path) -> tuple[int, int]:
    """Return what differs when another file takes its place: two checkpoints must not become one model."""
    stat = file.stat()
    return stat.st_mtime_ns, stat.st_size


def weight_files(path: Path) -> list[Path]:
    """Return the files that transformers loads: model.safetensors, else the shards in its index.

    Raises:
        ModelLoadError: the index is broken or names files other than *.safetensors beside it, or a shard is missing.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
    except (KeyError, TypeError, AttributeError) as error:  # TypeError: a name that is not a string
        raise ModelLoadError(f"{index} is not an index of shards: {AGAIN}") from error
    # transformers opens every file that the index names, and unpickles those not called *.safetensors.
    safe = all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names)
    refuse_if(not safe, f"{index} names files that are not *.safetensors beside it: nothing else is read")
    files = [path / name for name in names]
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise ModelLoadError(f"{len(absent)} of {len(files)} shards are missing, the first is {absent[0]}: {AGAIN}")
    return files
