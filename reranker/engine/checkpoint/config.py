"""Read config.json, and refuse a model that is not computed as Qwen3-Reranker is; no weight is read here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from reranker.engine.checkpoint.files import AGAIN, ORIGINAL, UNQUANTIZED, first_line, read_json, refuse_if
from reranker.engine.checkpoint.tokenizer import check_tokenizer, load_tokenizer
from reranker.errors import ModelLoadError

_QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantization_config.json": "torchao",
}
_ARCHITECTURES = {
    "Qwen3ForSequenceClassification": "has a classification head in place of the words yes and no: if it was "
    "converted, use the original Qwen3ForCausalLM weights; a trained head is not supported",
    "Qwen3Model": "is saved without lm_head, as embedding models are: use a reranker (Qwen3ForCausalLM)",
}
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
}
"""Fields that change the computation, with the values that are computed here. Null counts as absent."""
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_LENGTH_DEPENDENT = ("dynamic", "longrope")
"""Rope types that choose their frequencies by the longest input of a batch."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that may be loaded."""

    path: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase


def read(path: Path) -> Checkpoint:
    """Read the settings and the tokenizer of a folder that `locate` returned.

    Raises:
        ModelLoadError: a file cannot be read, or the model is not computed as Qwen3-Reranker is.
    """
    file = path / "config.json"
    settings = read_json(file)
    _check_quantization(path, settings)
    _check_architecture(path, settings)
    _check_rope(file, settings)
    _check_numbers(file, settings, "rms_norm_eps", "rope_theta")
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers raises a different type for each field
        raise ModelLoadError(f"{file} cannot be used: {first_line(error)}") from error
    sliding = any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())
    refuse_if(sliding, f"{file} has layers with sliding attention (layer_types): {ORIGINAL}")
    tokenizer = load_tokenizer(path)
    check_tokenizer(path, tokenizer, config.vocab_size)
    return Checkpoint(path, config, tokenizer)


def _check_quantization(path: Path, settings: dict[str, Any]) -> None:
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
    refuse_if(method, f"{path} is a quantised checkpoint ({method[:40]}), which is not read: {UNQUANTIZED}")


def _check_architecture(path: Path, settings: dict[str, Any]) -> None:
    file, kind = path / "config.json", settings.get("model_type")
    refuse_if(kind != "qwen3", f"model_type is {kind!r}, not 'qwen3': only Qwen3-Reranker (0.6B, 4B, 8B) is served")
    code = f"{file} asks for the checkpoint's own code (auto_map), which is never run: {ORIGINAL}, or remove auto_map"
    refuse_if("auto_map" in settings, f"{code} if the model is a plain Qwen3ForCausalLM")
    renamed = settings.get("transformers_weights")
    refuse_if(renamed, f"{file} names its weights (transformers_weights): rename that file to model.safetensors")
    names = settings.get("architectures") or ["Qwen3ForCausalLM"]
    name = str(names[0] if isinstance(names, list) else names)[:60]
    why = _ARCHITECTURES.get(name, "is not served: only Qwen3ForCausalLM is")
    served = isinstance(names, list) and "Qwen3ForCausalLM" in names
    refuse_if(not served, f"the architecture {name} of {path} {why}")
    for field, values in _COMPUTED.items():
        value = settings.get(field)
        refuse_if(value not in values, f"{file} has {field}={value!r}: Qwen3-Reranker is computed with {values[0]!r}")


def _check_rope(file: Path, settings: dict[str, Any]) -> None:
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
        _check_numbers(file, rope, "rope_theta", "factor", "original_max_position_embeddings")
        thetas.append(rope.get("rope_theta"))
    refuse_if(thetas == [None] * 3, f"{file} has no rope_theta: it is not the config.json of these weights")


def _check_numbers(file: Path, settings: dict[str, Any], *fields: str) -> None:
    """Refuse fields that are present and not positive numbers."""
    for field in fields:
        value = settings.get(field)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf
        wrong = value is not None and not number
        refuse_if(wrong, f"{file} has {field}={str(value)[:40]}: it must be a number above 0")
