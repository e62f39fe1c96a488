"""Read config.json and the tokenizer, and refuse forms that no family computes; no weight is read here."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from reranker.engine.checkpoint.adapter import Adapter
from reranker.engine.checkpoint.files import AGAIN, ORIGINAL, UNQUANTIZED, first_line, read_json, refuse_if
from reranker.engine.checkpoint.locate import Located
from reranker.engine.checkpoint.tokenizer import load_tokenizer
from reranker.errors import ModelLoadError

_QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantization_config.json": "torchao",
}
LAYOUT_FILES = ("modules.json", "1_LogitScore", "config_sentence_transformers.json")
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types that choose their frequencies by the longest input of a batch."""


class Checkpoint(NamedTuple):
    """A folder that may be loaded, with the adapter that is merged into its weights."""

    path: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter | None = None

    @property
    def layout_folder(self) -> Path:
        """The folder with the sentence-transformers files: the adapter's if it has any, else the base's."""
        own = self.adapter is not None and any((self.adapter.folder / name).exists() for name in LAYOUT_FILES)
        return self.adapter.folder if self.adapter is not None and own else self.path

    @property
    def merged(self) -> str:
        """What is merged into the weights, for logs; empty: nothing."""
        return "" if self.adapter is None else f"{self.adapter} into {self.path}"


def read_settings(located: Located) -> dict[str, Any]:
    """Read the config.json of a folder that `locate` returned, with the head of its adapter.

    Raises:
        ModelLoadError: it cannot be read, the weights are quantised, or the adapter is for another head.
    """
    path, adapter = located
    settings: dict[str, Any] = read_json(path / "config.json")
    stored = settings.get("quantization_config", settings.get("compression_config"))
    if isinstance(stored, dict):
        bitsandbytes = any(str(key).startswith("load_in_") for key in stored)
        method = str(stored.get("quant_method") or ("bitsandbytes" if bitsandbytes else "unknown method"))
    elif stored is not None:
        method = str(stored)
    elif settings.get("quantization"):
        method = "MLX"
    else:
        method = next((method for name, method in _QUANTIZATION_FILES.items() if (path / name).exists()), "")
    problem = f"{path} is a quantised checkpoint ({method[:40]}), which is not read"
    if adapter is None:
        refuse_if(method, f"{problem}: {UNQUANTIZED}")
        return settings
    refuse_if(method, f"{problem} as the base of the LoRA adapter in {adapter.folder}: {adapter.unquantized(path)}")
    return settings | adapter.settings(settings)


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
    tokenizer = load_tokenizer(path) if adapter is None else load_tokenizer(adapter.folder, path)
    return Checkpoint(path, config, tokenizer, adapter)


def check_rope(file: Path, settings: dict[str, Any]) -> None:
    """Refuse rotary embeddings that a packed batch cannot have, or that are not those of the weights."""
    thetas = [settings.get("rope_theta")]
    for field in ("rope_scaling", "rope_parameters"):
        rope = settings.get(field) or {}
        if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
            raise ModelLoadError(f"{file} has a {field} that is not a Qwen3 model's: {AGAIN}")
        kind = str(rope.get("rope_type") or rope.get("type") or "default")[:40]
        why = "makes a score depend on its batch" if kind in _LENGTH_DEPENDENT else "is not computed"
        known = f"use one of {', '.join(_ROPE_TYPES)}, or remove it"
        refuse_if(kind not in _ROPE_TYPES, f"{file} has the rope type {kind!r}, which {why}: {known}")
        partial = rope.get("partial_rotary_factor") not in (None, 1, 1.0)
        refuse_if(partial, f"{file} has a partial_rotary_factor, which no Qwen3-Reranker has: {AGAIN}")
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
