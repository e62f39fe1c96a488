"""Read a LoRA adapter, and merge it into the weights of its base: W + scale * B @ A, without peft.

Source of the format: peft 0.21 (`LoraConfig`, `get_peft_model_state_dict`, `LoraLayer.get_delta_weight`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reranker.engine.checkpoint.files import AGAIN, read_json, refuse_if, refuse_pointer
from reranker.engine.checkpoint.tensors import FLOATS, Stored, opened, read_header
from reranker.engine.checkpoint.weights import SCORE_HEAD
from reranker.errors import ModelLoadError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MERGE = "merge it into its base model first (peft: model.merge_and_unload().save_pretrained(folder))"
CAUSAL_LM, SEQ_CLS = "CAUSAL_LM", "SEQ_CLS"
_CLASSIFIER = "ForSequenceClassification"

_PREFIX = "base_model.model."
_PAIR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_OTHER = re.compile(r"lora_|token_adapter|modules_to_save|original_module")
_READ = frozenset("peft_type task_type r lora_alpha use_rslora bias init_lora_weights".split())
_WITHOUT_EFFECT = frozenset(
    # Where and how the adapter was trained: the names of its tensors say which weights it changes.
    "base_model_name_or_path revision auto_mapping peft_version inference_mode runtime_config lora_dropout "
    "target_modules exclude_modules layers_to_transform layers_pattern modules_to_save ensure_weight_tying "
    # Defaults and settings of an initialisation, or of an option that is off.
    "megatron_core qalora_group_size loftq_config eva_config "
    # Of ms-swift: the precision and the learning rates of training.
    "lora_dtype lorap_lr_ratio lorap_emb_lr".split()
)
_UNCHANGED_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initialisations that leave the base's weights as they are; pissa, olora, loftq and others train on changed ones."""
_MAX_ALPHA = torch.finfo(torch.float32).max


class Pair(NamedTuple):
    """The names of the two factors of one projection in the adapter's file."""

    a: str
    """[rank, in]"""
    b: str
    """[out, rank]"""


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter that can be merged. Names are those of the base's weights, such as `model.norm.weight`."""

    folder: Path
    base: str
    """`base_model_name_or_path`; empty if the adapter names none."""
    revision: str | None
    """Branch, tag or commit of the base on the hub."""
    task: str | None
    """`CAUSAL_LM`, or `SEQ_CLS` for a head of its own; None if the adapter does not say."""
    rank: int
    alpha: float
    scale: float
    pairs: Mapping[str, Pair]
    """The factors by the weight to which they are added."""
    saved: Mapping[str, str]
    """The tensors that replace a weight of the base, by the weight: heads, and other modules that were trained."""
    stored: Mapping[str, Stored]
    """Every tensor in the adapter's file."""

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read adapter_config.json and the header of adapter_model.safetensors.

        Raises:
            ModelLoadError: a file is missing or broken, or the adapter is of a form that is not merged here.
        """
        config, weights = folder / CONFIG, folder / WEIGHTS
        pickled = (folder / "adapter_model.bin").exists() and not weights.exists()
        refuse_if(pickled, f"{folder} holds adapter_model.bin, a pickle, which is not read: {MERGE}")
        for file in (config, weights):
            refuse_if(not file.is_file(), f"{folder} holds a LoRA adapter without {file.name}: {AGAIN}")
        settings = read_json(config)
        _check_options(config, settings)
        rank, alpha = settings["r"], float(settings["lora_alpha"])
        stored = _header(weights)
        pairs, saved = _grouped(weights, stored)
        for a, b in pairs.values():
            for factor, size in ((a, stored[a].shape[0]), (b, stored[b].shape[1])):
                wrong = f"{factor} in {weights} has the rank {size}, and {CONFIG} has r={rank}"
                refuse_if(size != rank, f"{wrong}: they do not belong to one adapter")
        return cls(
            folder=folder,
            base=str(settings.get("base_model_name_or_path") or ""),
            revision=settings.get("revision") or None,
            task=_task(settings),
            rank=rank,
            alpha=alpha,
            scale=alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank),
            pairs=pairs,
            saved=saved,
            stored=stored,
        )

    def settings(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the base's config.json that the adapter replaces: for a head of its own.

        Raises:
            ModelLoadError: the adapter was trained on a model with another head.
        """
        named = base.get("architectures") or []
        name = str(named[0] if isinstance(named, list) and named else named or "")
        classifier = name.endswith(_CLASSIFIER)
        problem = f"the LoRA adapter in {self.folder} is for {CAUSAL_LM}, and its base is a {name[:60]}"
        refuse_if(self.task == CAUSAL_LM and classifier, f"{problem}: use the base it was trained on")
        if self.task != SEQ_CLS:
            return {}
        model = re.sub(r"(For[A-Z]\w*|Model)$", "", name) or str(base.get("model_type", "")).capitalize()
        changes: dict[str, Any] = {"architectures": [name if classifier else model + _CLASSIFIER]}
        if score := self.saved.get(SCORE_HEAD):
            changes["num_labels"] = self.stored[score].shape[0]
        return changes

    def unquantized(self, path: Path) -> str:
        """Return the way out where the base in `path` is quantised."""
        if path == self.folder:
            return "put the files of the adapter beside the base's unquantised weights"
        return f"write the base's unquantised original into base_model_name_or_path in {self.folder / CONFIG}"

    def check(self, needed: Mapping[str, tuple[int, ...]]) -> None:
        """Prove that every tensor of the adapter has its place in the base; `needed` holds its weights' shapes.

        Raises:
            ModelLoadError: names the first tensor that matches no weight, or has another shape.
        """
        for name, (a, b) in self.pairs.items():
            self._check_place(a, name, (self.stored[b].shape[0], self.stored[a].shape[-1]), needed)
        for name, tensor in self.saved.items():
            self._check_place(tensor, name, self.stored[tensor].shape, needed)

    def _check_place(
        self, tensor: str, name: str, shape: tuple[int, ...], needed: Mapping[str, tuple[int, ...]]
    ) -> None:
        problem = f"{tensor} in {self.folder / WEIGHTS}"
        refuse_if(name not in needed, f"{problem} matches no weight of the base: use the base it was trained on")
        if shape != needed[name]:
            sizes = f"is for a weight of {list(shape)}, and {name} of the base is {list(needed[name])}"
            raise ModelLoadError(f"{problem} {sizes}: use the base it was trained on, or {MERGE}")

    def merge(self, name: str, base: Callable[[str], Tensor]) -> Tensor:
        """Return the merged weight: in float32 where factors are added, the saved tensor as stored, else the base's.

        Args:
            name: of the weight.
            base: returns the base's weight; not called where a saved tensor replaces it.
        """
        if name not in self.saved and name not in self.pairs:
            return base(name)
        with opened(self.folder / WEIGHTS) as tensors:
            weight: Tensor = tensors.get_tensor(self.saved[name]) if name in self.saved else base(name)
            if name in self.pairs:
                a, b = (tensors.get_tensor(factor).float() for factor in self.pairs[name])
                weight = weight.float().addmm(b, a, alpha=self.scale)
            return weight

    def is_untrained(self) -> bool:
        """Return whether every product B @ A is zero, as at the start of a training. Reads all factors."""
        with opened(self.folder / WEIGHTS) as tensors:
            trained = any(all(tensors.get_tensor(factor).any() for factor in pair) for pair in self.pairs.values())
        return bool(self.pairs) and not trained

    def not_finite(self) -> str | None:
        """Return the name and file of the first tensor with a NaN or an infinity; None without any. Reads all."""
        file = self.folder / WEIGHTS
        with opened(file) as tensors:
            for name in sorted(self.stored):
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    return f"{name} in {file}"
        return None

    def __str__(self) -> str:
        saved = f", saved {', '.join(sorted(self.saved))}" if self.saved else ""
        return f"{self.folder} (rank {self.rank}, alpha {self.alpha:g}, {len(self.pairs)} projections{saved})"


def _check_options(file: Path, settings: dict[str, Any]) -> None:
    """Refuse every option that changes the merge, known or not."""
    kind, task = settings.get("peft_type"), settings.get("task_type")
    refuse_if(kind != "LORA", f"{file} has peft_type {str(kind)[:40]!r}, and only LORA is merged here: {MERGE}")
    gives = f"{file} has task_type {str(task)[:40]!r}: only {CAUSAL_LM} and {SEQ_CLS} give a relevance"
    refuse_if(task not in (CAUSAL_LM, SEQ_CLS, None), gives)
    for name in sorted(settings.keys() - _READ - _WITHOUT_EFFECT):
        refuse_if(settings[name], f"{file} sets {name[:40]}, which is not merged here: {MERGE}")
    bias, start = settings.get("bias", "none"), settings.get("init_lora_weights", True)
    refuse_if(bias != "none", f"{file} has bias={str(bias)[:40]!r}, which is not merged here: {MERGE}")
    changed = f"{file} has init_lora_weights={str(start)[:40]!r}, which changes the base's weights: {MERGE}"
    refuse_if(start not in _UNCHANGED_BASE, changed)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank > 0
    refuse_if(not whole, f"{file} has r={str(rank)[:40]}: it must be an integer above 0")
    number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < abs(alpha) < _MAX_ALPHA
    refuse_if(not number, f"{file} has lora_alpha={str(alpha)[:40]}: it must be a number, and with 0 nothing is merged")
    root = settings.get("use_rslora")
    refuse_if(root not in (True, False, None), f"{file} has use_rslora={str(root)[:40]!r}: it must be true or false")
    revision = settings.get("revision")
    refuse_if(not isinstance(revision, str | None), f"{file} has a revision that is not a text: {AGAIN}")


def _task(settings: dict[str, Any]) -> str | None:
    task = settings.get("task_type")
    trained = settings.get("auto_mapping")
    name = str(trained.get("base_model_class")) if isinstance(trained, dict) else ""
    return SEQ_CLS if task is None and name.endswith(_CLASSIFIER) else task


def _header(file: Path) -> dict[str, Stored]:
    """Return every tensor by name; refuse quantised ones."""
    with file.open("rb") as content:
        refuse_pointer(file, content.read(100))
    stored = read_header(file)
    for name, tensor in stored.items():
        refuse_if(tensor.dtype not in FLOATS, f"{name} in {file} is {tensor.dtype}: an adapter has {', '.join(FLOATS)}")
    refuse_if(not stored, f"{file} holds no tensors: {AGAIN}")
    return stored


def _grouped(file: Path, stored: Mapping[str, Stored]) -> tuple[dict[str, Pair], dict[str, str]]:
    """Return the factors and the saved tensors by the base's weight, each tensor of the file exactly once."""
    factors: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for name in sorted(stored):
        own = f"{name[:200]} in {file}"
        refuse_if(not name.startswith(_PREFIX), f"{own} is not a name of peft's ({_PREFIX}...): {MERGE}")
        inner = name.removeprefix(_PREFIX)
        if match := _PAIR.fullmatch(inner):
            shape = stored[name].shape
            refuse_if(len(shape) != 2, f"{own} is {list(shape)}, not a matrix: {MERGE}")
            factors.setdefault(f"{match['module']}.weight", {})[match["side"]] = name
            continue
        cause = "only lora_A and lora_B of linear layers are merged here, and whole modules saved with them"
        refuse_if(_OTHER.search(inner), f"{own}: {cause}; {MERGE}")
        weight = inner.replace(".base_layer.", ".")
        refuse_if(weight in saved, f"{own} is there twice, the other is {saved.get(weight)}: {AGAIN}")
        saved[weight] = name
    for weight, sides in factors.items():
        for here, other in (("A", "B"), ("B", "A")):
            single = here in sides and other not in sides
            refuse_if(single, f"{sides.get(here)} in {file} has no lora_{other} beside it: {AGAIN}")
        twice = weight in saved and ".base_layer." not in saved[weight]
        refuse_if(twice, f"{file} holds both {saved.get(weight)} and factors of it, and only one can be meant: {MERGE}")
    return {weight: Pair(sides["A"], sides["B"]) for weight, sides in factors.items()}, saved
