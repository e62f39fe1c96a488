"""Read config.json and the tokenizer, and refuse forms that no family computes; no weight is read here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from reranker.engine.checkpoint.adapter import Adapter
from reranker.engine.checkpoint.files import ORIGINAL, first_line, read_json, refuse_if
from reranker.engine.checkpoint.locate import Located
from reranker.engine.checkpoint.quantization import read_scheme
from reranker.engine.checkpoint.scales import Scheme
from reranker.engine.checkpoint.tokenizer import load_tokenizer
from reranker.errors import ModelLoadError

_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types that choose their frequencies by the longest input of a batch."""


class Checkpoint(NamedTuple):
    """A folder that may be loaded, with the adapter that is merged into its weights."""

    path: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None = None
    scheme: Scheme | None = None
    """The form of quantised weights."""

    @property
    def folders(self) -> list[Path]:
        """See `Located.folders`."""
        return Located(self.path, self.adapter).folders

    @property
    def merged(self) -> str:
        """What is merged into the weights, for logs; empty: nothing."""
        return "" if self.adapter is None else f"{self.adapter} into {self.path}"


def read_settings(located: Located) -> dict[str, Any]:
    """Read the config.json of a folder that `locate` returned, with the head of its adapter.

    Raises:
        ModelLoadError: it cannot be read, the weights are quantised in a form that is not read, or the adapter is for
            another head.
    """
    path, adapter = located
    settings: dict[str, Any] = read_json(path / "config.json")
    try:
        read_scheme(path, settings)
    except ModelLoadError as error:
        if adapter is None:
            raise
        problem = f"the base of the LoRA adapter in {adapter.folder} cannot be used: {error}"
        raise ModelLoadError(f"{problem}; {adapter.unquantized(path)}") from error
    return settings if adapter is None else settings | adapter.settings(settings)


def read(located: Located, settings: dict[str, Any]) -> Checkpoint:
    """Read config.json, whose `settings` the family has checked, and the tokenizer.

    Raises:
        ModelLoadError: a file cannot be read or does not fit the others, or config.json names code or other weights.
    """
    path, adapter = located
    file = path / "config.json"
    code = f"{file} asks for the checkpoint's own code (auto_map), which is never run: {ORIGINAL}, or remove auto_map"
    refuse_if("auto_map" in settings, f"{code} if a class of transformers computes the model")
    renamed = settings.get("transformers_weights")
    refuse_if(renamed, f"{file} names its weights (transformers_weights): rename that file to model.safetensors")
    try:
        changes = {} if adapter is None else adapter.settings(settings)
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False, **changes)
    except Exception as error:  # transformers raises a different type for each field
        raise ModelLoadError(f"{file} cannot be used: {first_line(error)}") from error
    own, *base = located.folders
    return Checkpoint(path, config, load_tokenizer(own, *base), adapter, read_scheme(path, settings))


def check_rope(file: Path, settings: dict[str, Any]) -> None:
    """Refuse rotary embeddings that a packed batch cannot have, or that are not those of the weights."""
    thetas = [settings.get("rope_theta")]
    for field in ("rope_scaling", "rope_parameters"):
        rope = settings.get(field) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ModelLoadError(f"{file} has a {field} that differs by layer or is no object: it is not computed")
        kind = str(rope.get("rope_type") or rope.get("type") or "default")[:40]
        why = "makes a score depend on its batch" if kind in _LENGTH_DEPENDENT else "is not computed"
        known = f"use one of {', '.join(_ROPE_TYPES)}, or remove it"
        refuse_if(kind not in _ROPE_TYPES, f"{file} has the rope type {kind!r}, which {why}: {known}")
        partial = rope.get("partial_rotary_factor") not in (None, 1, 1.0)
        refuse_if(partial, f"{file} has a partial_rotary_factor, which is not computed")
        check_numbers(file, rope, "rope_theta", "factor", "original_max_position_embeddings")
        thetas.append(rope.get("rope_theta"))
    refuse_if(thetas == [None] * 3, f"{file} has no rope_theta: it is not the config.json of these weights")


def check_numbers(file: Path, settings: dict[str, Any], *fields: str) -> None:
    """Refuse fields that are present and not positive numbers."""
    for field in fields:
        value = settings.get(field)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        wrong = value is not None and not number
        refuse_if(wrong, f"{file} has {field}={str(value)[:40]}: it must be a number above 0")
