"""Compare the tensors in a checkpoint's files with those that the model needs, from the files' headers alone.

transformers fills what a file lacks with random numbers and reports it in a log line; here it is an error.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PretrainedConfig

from reranker.engine.checkpoint.config import first_line, read_json
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_AGAIN = "download the checkpoint again"
_FLOATS = ("F64", "F32", "F16", "BF16")
_QUANTISED = re.compile(
    r"(weight_scale|scale_inv|input_scale|weight_packed|weight_shape|weight_zero_point|qweight|qzeros|g_idx|scales|"
    r"biases|absmax|quant_map|quant_state)(\.|_|$)"
)
_ADAPTER = re.compile(r"(lora_|ia3_|prompt_encoder|base_layer|modules_to_save)", re.IGNORECASE)
_VALUE_HEAD = re.compile(r"(v_head|value_head)")
_HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$")
"""Inside the decoder; every other tensor there that the model does not have would have changed the scores."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")
_HEADS = ("lm_head.", "score.", "classifier.", "model.")


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: F32, BF16, ..."""


def weight_files(path: Path) -> list[Path]:
    """Return the files that transformers loads: model.safetensors, else the shards that its index names.

    Raises:
        ModelLoadError: the index is broken, names other files than *.safetensors beside it, or a shard is missing.
    """
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    try:
        names = set(read_json(index)["weight_map"].values())
    except (KeyError, TypeError, AttributeError) as error:  # TypeError: a name that is no text
        raise ModelLoadError(f"{index} is not an index of shards: {_AGAIN}") from error
    # transformers opens whatever the index names, and unpickles what is not called *.safetensors.
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise ModelLoadError(f"{index} names files that are not *.safetensors beside it: nothing else is read")
    absent = sorted(name for name in names if not (path / name).is_file())
    if absent:
        raise ModelLoadError(
            f"{len(absent)} of {len(names)} shards are missing, the first is {path / absent[0]}: {_AGAIN}"
        )
    return sorted(path / name for name in names)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is broken or half downloaded ({error}): download it again") from error


def inventory(path: Path) -> dict[str, Stored]:
    """Return every tensor of the checkpoint by name, from the headers.

    Raises:
        ModelLoadError: a file is broken.
    """
    found: dict[str, Stored] = {}
    for file in weight_files(path):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118  # not a dictionary
                part = tensors.get_slice(name)
                found[name] = Stored(tuple(part.get_shape()), str(part.get_dtype()))
    return found


def parameters(path: Path) -> int:
    """Return the number of weights in the files, from their headers."""
    return sum(torch.Size(stored.shape).numel() for stored in inventory(path).values())


def not_finite(path: Path) -> str | None:
    """Return the first tensor that holds NaN or an infinity, and its file; None if all are finite. Reads all files."""
    for file in weight_files(path):
        with _opened(file) as tensors:
            for name in sorted(tensors.keys()):
                if not torch.isfinite(tensors.get_tensor(name)).all():
                    return f"{name} in {file}"
    return None


def check_weights(path: Path, config: PretrainedConfig) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of the model, and log what is left over and harmless.

    Raises:
        ModelLoadError: names the number of wrong tensors, the first one and the likely cause.
    """
    stored = inventory(path)
    needed = _needed(path, config)
    missing, unexpected = [n for n in needed if n not in stored], [n for n in stored if n not in needed]
    if config.tie_word_embeddings and len(tied := {"lm_head.weight", "model.embed_tokens.weight"} & set(missing)) == 1:
        missing = [name for name in missing if name not in tied]
    _refuse_forms(path, stored, needed, unexpected)
    if missing:
        raise ModelLoadError(
            f"{len(missing)} of the {len(needed)} weights that the model needs are not in {path}, the first is "
            f"{missing[0]}: {_cause(missing, stored, config)}"
        )
    for name, shape in needed.items():
        if name in stored and stored[name].shape != shape:
            raise ModelLoadError(
                f"{name} is {list(stored[name].shape)} in {path}, and {list(shape)} by config.json: the two are not "
                f"of one model (look at hidden_size, head_dim, intermediate_size and vocab_size)"
            )
    _check_unexpected(path, stored, unexpected, config)


def _needed(path: Path, config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model that config.json describes."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:  # of torch or transformers, for sizes that make no model
        raise ModelLoadError(f"{path / 'config.json'} describes no model: {first_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _refuse_forms(path: Path, stored: Mapping[str, Stored], needed: Iterable[str], unexpected: Iterable[str]) -> None:
    """Refuse weights of an adapter, and quantised ones without their settings in config.json."""
    first = next((name for name in unexpected if _ADAPTER.search(name)), None)
    if first:
        raise ModelLoadError(
            f"{path} holds weights of an adapter that was not merged ({first}): save the model after merge_and_unload()"
        )
    inside = (name for name in unexpected if name.startswith(_HEADS))
    first = next((name for name in inside if _QUANTISED.search(name)), None)
    first = first or next((name for name in needed if name in stored and stored[name].dtype not in _FLOATS), None)
    if first:
        raise ModelLoadError(
            f"{path} holds quantised weights ({first}, {stored[first].dtype}), and config.json has lost its "
            f"quantization_config: use the original weights, and MODEL_PRECISION=int8 on a CPU or float8 on a GPU"
        )


def _cause(missing: list[str], stored: Iterable[str], config: PretrainedConfig) -> str:
    """Return the likely cause of missing weights, and the way out."""
    names = set(stored)
    for name in names:
        if name.endswith(missing[0]):
            return (
                f"the names in the files begin with {name.removesuffix(missing[0])!r}: remove it, or save the model "
                f"without its wrapper (PEFT: merge_and_unload(), torch.compile: _orig_mod, DataParallel: module)"
            )
    if missing[0].removeprefix("model.") in names:
        return (
            "the names in the files lack 'model.', as those of an embedding model or of a bare backbone do: use a "
            "reranker, or save the whole Qwen3ForCausalLM"
        )
    if missing == ["lm_head.weight"]:
        return (
            'save the head with the model, or write "tie_word_embeddings": true in config.json if the head shares '
            "the weights of the embedding"
        )
    held = 1 + max((int(match[1]) for name in names if (match := _LAYER.match(name))), default=-1)
    if held and all((match := _LAYER.match(name)) and int(match[1]) >= held for name in missing):
        return (
            f"the files hold {held} layers and config.json has {config.num_hidden_layers}: config.json is of a model "
            f"of another size"
        )
    if not any(name in names for name in ("model.embed_tokens.weight", "lm_head.weight")):
        first = min(names, default="")[:80]
        return f"the names, such as {first}, are those of another program: convert the model with save_pretrained"
    return f"a part of the model was not saved or not downloaded: {_AGAIN}"


def _check_unexpected(
    path: Path, stored: Mapping[str, Stored], unexpected: list[str], config: PretrainedConfig
) -> None:
    """Refuse tensors that would have changed the scores, and log the others."""
    heads = [n for n in unexpected if _is_head(stored[n].shape, config.hidden_size) and not _VALUE_HEAD.search(n)]
    inside = [n for n in unexpected if n.startswith(_HEADS) and not _HARMLESS.search(n)]
    first = next(iter(inside + heads), None)
    if first:
        layer = _LAYER.match(first)
        cause = "config.json does not describe them"
        if layer and int(layer[1]) >= config.num_hidden_layers:
            cause = f"config.json has {config.num_hidden_layers} layers only: it is of a model of another size"
        elif first.endswith(".bias") and ".self_attn." in first:
            cause = "the model has no biases by config.json (attention_bias)"
        elif not first.startswith("model."):
            cause = "another head is not computed: use a checkpoint that answers with yes and no"
        raise ModelLoadError(f"{len(unexpected)} weights in {path} would be ignored, the first is {first}: {cause}")
    if unexpected:
        logger.warning(
            "%d weights in %s are not part of the model and are ignored: %s", len(unexpected), path, unexpected[0]
        )


def _is_head(shape: tuple[int, ...], hidden_size: int) -> bool:
    """Whether a tensor of this shape makes one or two logits of a hidden state."""
    return len(shape) == 2 and shape[0] <= 2 and shape[1] == hidden_size
