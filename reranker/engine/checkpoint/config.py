"""Read a checkpoint's settings and tokenizer, and refuse a model that is computed in another way than it was made for.

Everything here happens before a weight is read. layout.py reads the files of the sentence-transformers layout;
weights.py compares the names and shapes of the tensors with the model that config.json describes.
"""

from __future__ import annotations

import json
import logging
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from reranker.engine.checkpoint.locate import LFS_POINTER
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

ROPE_TYPES = ("default", "linear", "yarn", "llama3")
_BY_LENGTH = ("dynamic", "longrope")
"""Rope types that choose their frequencies by the longest input: a score would depend on the rest of the batch."""
CONTROL_TOKENS = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")
_ORIGINAL = "use the original weights, such as Qwen/Qwen3-Reranker-4B"
_QUANTIZED = f"{_ORIGINAL}, and MODEL_PRECISION=int8 on a CPU or float8 on a GPU"
_QUANTIZATION_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantization_config.json": "torchao",
}
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
}
"""Fields of config.json that change the computation, and the values that are computed here. Null is as absent."""
_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A folder that may be loaded."""

    path: Path
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase


def read(path: Path) -> Checkpoint:
    """Read the settings and the tokenizer of a folder that `locate` returned.

    Raises:
        ModelLoadError: a file cannot be read, or the model is another one than Qwen3-Reranker computes.
    """
    file = path / "config.json"
    settings = read_json(file)
    _refuse_quantised(path, settings)
    _refuse_architecture(path, settings)
    _refuse_rope(file, settings)
    try:
        config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # transformers checks each field in its own way, and raises what it finds
        raise ModelLoadError(f"{file} cannot be used: {first_line(error)}") from error
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ModelLoadError(f"{file} asks for sliding attention (layer_types): {_ORIGINAL}")
    tokenizer = load_tokenizer(path)
    _check_tokenizer(path, tokenizer, config.vocab_size)
    return Checkpoint(path, config, tokenizer)


def first_line(error: BaseException) -> str:
    """Return what an exception of a library says, on one line of at most 200 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2])[:200]


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file of the checkpoint that holds an object, or a list where `kind` is list.

    Raises:
        ModelLoadError: it is no such file, or is not stored as UTF-8 without a byte order mark.
    """

    def refuse(constant: str) -> NoReturn:
        raise ModelLoadError(f"{file} holds {constant}, which is not JSON: download the checkpoint again")

    try:
        content = file.read_bytes()
        if content.startswith(_MARKS):
            raise ModelLoadError(f"{file} begins with a byte order mark: save it as UTF-8 without one")
        if content.startswith(LFS_POINTER):
            raise ModelLoadError(f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull`")
        value = json.loads(content, parse_constant=refuse)
    except OSError as error:
        raise ModelLoadError(f"cannot read {file}: {error.strerror}; download the checkpoint again") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is not JSON: download the checkpoint again") from error
    if not isinstance(value, kind):
        raise ModelLoadError(
            f"{file} is not a JSON {'object' if kind is dict else 'array'}: download the checkpoint again"
        )
    return value


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load the checkpoint's own fast tokenizer.

    Raises:
        ModelLoadError: its files are missing or broken.
    """
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "added_tokens.json"):
        if (path / name).is_file():
            read_json(path / name)
    template = path / "chat_template.jinja"
    if template.is_file() and template.read_bytes().startswith(_MARKS):
        raise ModelLoadError(f"{template} begins with a byte order mark: save it as UTF-8 without one")
    if not (path / "tokenizer.json").is_file():
        _check_merges(path)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except Exception as error:  # the Rust library raises bare Exceptions
        raise ModelLoadError(f"no usable tokenizer in {path}: {first_line(error)}") from error
    return tokenizer


def _check_merges(path: Path) -> None:
    """Refuse a merges.txt that was cut off: texts would be split into other tokens, without any error."""
    try:
        lines = (path / "merges.txt").read_text(encoding="utf-8").splitlines()
    except ValueError as error:
        raise ModelLoadError(f"{path / 'merges.txt'} is not UTF-8: download the checkpoint again") from error
    merged = {"".join(line.split(" ")) for line in lines}
    vocabulary = read_json(path / "vocab.json")
    absent = [t for t in vocabulary if len(t) > 1 and t not in merged and not re.fullmatch(r"<.*>", t)]
    if absent:
        raise ModelLoadError(
            f"{path / 'merges.txt'} has no merge for {len(absent)} of the {len(vocabulary)} tokens in vocab.json: it "
            f"was cut off, download the checkpoint again"
        )


def _refuse_quantised(path: Path, settings: dict[str, Any]) -> None:
    stored = settings.get("quantization_config", settings.get("compression_config"))
    method = ""
    if isinstance(stored, dict):
        bits = "bitsandbytes" if any(str(key).startswith("load_in_") for key in stored) else "unknown method"
        method = str(stored.get("quant_method") or bits)
    elif stored is not None:
        method = str(stored)
    elif settings.get("quantization"):
        method = "MLX"
    else:
        method = next((kind for file, kind in _QUANTIZATION_FILES.items() if (path / file).exists()), "")
    if method:
        raise ModelLoadError(f"{path} is a quantised checkpoint ({method[:40]}), which is not read: {_QUANTIZED}")


def _refuse_architecture(path: Path, settings: dict[str, Any]) -> None:
    file = path / "config.json"
    kind, names = settings.get("model_type"), settings.get("architectures") or ["Qwen3ForCausalLM"]
    if kind != "qwen3":
        raise ModelLoadError(
            f"model_type is {kind!r}, not 'qwen3': this service runs Qwen3-Reranker (0.6B, 4B, 8B) only"
        )
    if "auto_map" in settings:
        raise ModelLoadError(
            f"{file} asks for code of its own (auto_map), which is never run: {_ORIGINAL}, or remove auto_map if the "
            f"model is a plain Qwen3ForCausalLM"
        )
    if settings.get("transformers_weights"):
        raise ModelLoadError(f"{file} names its weights (transformers_weights): call the file model.safetensors")
    if not isinstance(names, list) or "Qwen3ForCausalLM" not in names:
        about = {
            "Qwen3ForSequenceClassification": "has a classification head in place of the words yes and no: if it was "
            "converted, use the original Qwen3ForCausalLM weights; a head that was trained is not supported",
            "Qwen3Model": "is saved without lm_head, as embedding models are: use a reranker (Qwen3ForCausalLM)",
        }
        name = str(names[0] if isinstance(names, list) else names)[:60]
        raise ModelLoadError(
            f"the architecture {name} of {path} {about.get(name, 'is not served: only Qwen3ForCausalLM is')}"
        )
    for field, values in _COMPUTED.items():
        if settings.get(field) is not None and settings[field] not in values:
            raise ModelLoadError(
                f"{file} has {field}={settings[field]!r}: only {values[0]!r} is computed here, as in every "
                f"Qwen3-Reranker"
            )
    _check_number(file, "rms_norm_eps", settings)


def _check_number(file: Path, field: str, settings: dict[str, Any]) -> None:
    value = settings.get(field)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (number and math.isfinite(value) and value > 0):
        raise ModelLoadError(f"{file} has {field}={str(value)[:40]}, which must be a number above 0")


def _refuse_rope(file: Path, settings: dict[str, Any]) -> None:
    ropes: list[dict[str, Any]] = []
    for field in ("rope_scaling", "rope_parameters"):
        value = settings.get(field) or {}
        if not isinstance(value, dict) or any(isinstance(part, dict) for part in value.values()):
            raise ModelLoadError(f"{file} has another {field} than a Qwen3 model: download the checkpoint again")
        ropes.append(value)
    for rope in ropes:
        kind = str(rope.get("rope_type") or rope.get("type") or "default")[:40]
        if kind not in ROPE_TYPES:
            why = "a score would depend on the other documents of its batch" if kind in _BY_LENGTH else "not computed"
            raise ModelLoadError(
                f"{file} has the rope type {kind!r} ({why}): use one of {', '.join(ROPE_TYPES)}, or remove it"
            )
        if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise ModelLoadError(f"{file} has a partial_rotary_factor: no Qwen3-Reranker has one")
        for field in ("rope_theta", "factor", "original_max_position_embeddings"):
            _check_number(file, field, rope)
    _check_number(file, "rope_theta", settings)
    if settings.get("rope_theta") is None and not any("rope_theta" in rope for rope in ropes):
        raise ModelLoadError(f"{file} has no rope_theta: it is not the file that belongs to these weights")


def _check_tokenizer(path: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Refuse a tokenizer that splits a control token, gives random ids, or ids for which the model has no row."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and getattr(backend.model, "dropout", None):
        raise ModelLoadError(f"the tokenizer in {path} drops merges at random (dropout): set it to null")
    if getattr(tokenizer, "split_special_tokens", False):
        raise ModelLoadError(f"{path / 'tokenizer_config.json'} sets split_special_tokens: remove it")
    control: list[int] = []
    for text in CONTROL_TOKENS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            whole = any((path / name).is_file() for name in ("tokenizer_config.json", "added_tokens.json"))
            raise ModelLoadError(
                f"the tokenizer in {path} splits {text} into {len(ids)} tokens: "
                + ("it is not that of a Qwen3-Reranker" if whole else "tokenizer_config.json is missing")
            )
        control += ids
    ordinary = backend.get_vocab(with_added_tokens=False).values() if backend is not None else ()
    largest = max([*control, *ordinary])
    if largest >= rows:
        raise ModelLoadError(
            f"the tokenizer in {path} has the token id {largest}, but config.json has a vocab_size of {rows}: the two "
            f"are not of one model"
        )
