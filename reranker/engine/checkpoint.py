"""Read what a folder says of itself, and refuse a checkpoint that would be scored in another way than it was made for.

Everything here happens before a weight is read: config.json, the tokenizer, and the files of the sentence-transformers
layout (layout.py). weights.py compares the names and shapes of the tensors with the model that config.json describes.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""The others choose their frequencies by the length of the input: a score would depend on the batch that it is in."""
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
_ORIGINAL = "use the original weights, such as Qwen/Qwen3-Reranker-4B"
_QUANTIZED = f"{_ORIGINAL}, and MODEL_PRECISION=int8 on a CPU or float8 on a GPU"
_QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantization_config.json": "torchao",
}
_AS_TRAINED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "use_sliding_window": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
}
"""Fields of config.json that change the computation, and the values that are computed here. Null is as absent."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that may be loaded."""

    path: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase


def read(path: Path) -> Checkpoint:
    """The settings and the tokenizer of a folder that `locate` returned.

    Raises:
        ModelLoadError: a file cannot be read, or the model is another one than Qwen3-Reranker computes.
    """
    settings = read_json(path / "config.json")
    _refuse_quantised(path, settings)
    _refuse_architecture(path, settings)
    _refuse_rope(path, settings)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers checks each field in its own way, and raises what it finds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelLoadError(f"{path / 'config.json'} cannot be used: {' '.join(lines[:2])}") from error
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ModelLoadError(f"{path / 'config.json'} asks for sliding attention (layer_types): {_ORIGINAL}")
    tokenizer = load_tokenizer(path)
    _check_tokenizer(path, tokenizer, config.vocab_size)
    return Checkpoint(path, config, tokenizer)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of the checkpoint.

    Raises:
        ModelLoadError: it is no such object, or is not stored as UTF-8 without a byte order mark.
    """
    try:
        content = file.read_bytes()
        if content.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
            raise ModelLoadError(f"{file} begins with a byte order mark: save it as UTF-8 without one")
        value = json.loads(content)
    except OSError as error:
        raise ModelLoadError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not JSON: download the checkpoint again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} is not a JSON object: download the checkpoint again")
    return value


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own fast tokenizer.

    Raises:
        ModelLoadError: its files are missing or broken.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json"):
        if (path / name).is_file():
            read_json(path / name)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exceptions
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(f"no usable tokenizer in {path}: {reason[0]}") from error
    return tokenizer


def _refuse_quantised(path: Path, settings: dict[str, Any]) -> None:
    stored = settings.get("quantization_config") or settings.get("compression_config")
    method = ""
    if isinstance(stored, dict):
        bits = "bitsandbytes" if any(str(key).startswith("load_in_") for key in stored) else "unknown method"
        method = str(stored.get("quant_method") or bits)
    elif settings.get("quantization"):
        method = "MLX"
    else:
        method = next((kind for file, kind in _QUANTIZATION_FILES.items() if (path / file).exists()), "")
    if method:
        raise ModelLoadError(f"{path} is a quantised checkpoint ({method[:40]}), which is not read: {_QUANTIZED}")


def _refuse_architecture(path: Path, settings: dict[str, Any]) -> None:
    kind, names = settings.get("model_type"), settings.get("architectures") or ["Qwen3ForCausalLM"]
    if kind != "qwen3":
        raise ModelLoadError(
            f"model_type is {kind!r}, not 'qwen3': this service runs Qwen3-Reranker (0.6B, 4B, 8B) only"
        )
    if "auto_map" in settings:
        raise ModelLoadError(
            f"{path / 'config.json'} asks for code of its own (auto_map), which is never run: {_ORIGINAL}, or remove "
            f"auto_map if the model is a plain Qwen3ForCausalLM"
        )
    if settings.get("transformers_weights"):
        raise ModelLoadError(
            f"{path / 'config.json'} names its weights (transformers_weights): call it model.safetensors"
        )
    if "Qwen3ForCausalLM" not in names:
        about = {
            "Qwen3ForSequenceClassification": "has a classification head in place of the words yes and no: if it was "
            "converted, use the original Qwen3ForCausalLM weights; a head that was trained is not supported",
            "Qwen3Model": "is saved without lm_head, as embedding models are: use a reranker (Qwen3ForCausalLM)",
        }
        other = about.get(str(names[0]), "is not served: only Qwen3ForCausalLM is")
        raise ModelLoadError(f"the architecture {str(names[0])[:60]} of {path} {other}")
    for field, values in _AS_TRAINED.items():
        if settings.get(field) is not None and settings[field] not in values:
            raise ModelLoadError(
                f"{path / 'config.json'} has {field}={settings[field]!r}: only {values[0]!r} is computed here, as in "
                f"every Qwen3-Reranker"
            )


def _refuse_rope(path: Path, settings: dict[str, Any]) -> None:
    file = path / "config.json"
    found: list[dict[str, Any]] = []
    for field in ("rope_scaling", "rope_parameters"):
        value = settings.get(field) or {}
        if not isinstance(value, dict):
            raise ModelLoadError(
                f"{file} has {field}={value!r}, which is no JSON object: download the checkpoint again"
            )
        found += [part for part in value.values() if isinstance(part, dict)] or [value]
    for rope in found:
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise ModelLoadError(
                f"{file} has the rope type {str(kind)[:40]!r}, with which a score would depend on the other documents "
                f"of its batch: use one of {', '.join(ROPE_TYPES)}, or remove it"
            )
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ModelLoadError(f"{file} has a partial_rotary_factor: no Qwen3-Reranker has one")
    if settings.get("rope_theta") is None and not any("rope_theta" in rope for rope in found):
        raise ModelLoadError(f"{file} has no rope_theta: it is not the file that belongs to these weights")


def _check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Every control token is one token, and no text gives an id for which the model has no row."""
    control: list[int] = []
    for text in CONTROL_TOKENS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ModelLoadError(
                f"the tokenizer in {path} splits {text} into {len(ids)} tokens: it is not that of a Qwen3-Reranker"
            )
        control += ids
    backend = getattr(tokenizer, "backend_tokenizer", None)
    ordinary = backend.get_vocab(with_added_tokens=False).values() if backend is not None else ()
    largest = max([*control, *ordinary])
    if largest >= rows:
        raise ModelLoadError(
            f"the tokenizer in {path} has the token id {largest}, but config.json has a vocab_size of {rows}: the two "
            f"are not of one model"
        )
