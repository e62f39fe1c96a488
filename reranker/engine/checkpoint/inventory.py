"""Whether the tensors of a checkpoint are those of its model.

transformers initialises missing tensors at random and reports them in a log line; here they are an error.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from reranker.engine.checkpoint.files import AGAIN, UNQUANTIZED, first_line, refuse_if
from reranker.engine.checkpoint.tensors import FLOATS, Stored
from reranker.engine.checkpoint.weights import EMBEDDING, HEAD, SCORE_HEAD, Weights
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

_QUANTIZED = re.compile(
    r"(weight_scale|scale_inv|input_scale|weight_packed|weight_shape|weight_zero_point|qweight|qzeros|g_idx|scales|"
    r"biases|absmax|quant_map|quant_state)(\.|_|$)"
)
_ADAPTER = re.compile(r"(lora_|ia3_|prompt_encoder|base_layer|modules_to_save)", re.IGNORECASE)
_OTHER_HEAD = re.compile(r"(v_head|value_head|^cls\.)")
"""Heads of reinforcement learning, and those of BERT's training."""
_HEADS = ("lm_head.", "score.", "classifier.")
"""A tensor inside the model or one of these that it does not have would have changed the scores, except _HARMLESS."""
_HARMLESS = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.(position_ids|token_type_ids)|pooler\.dense\.\w+)$")
_OTHER_SIZE = "config.json belongs to a model of another size"
_LAYER = re.compile(r"^[\w.]+\.layers?\.(\d+)\.")
_CLASSIFIER = re.compile(r"^(classifier|head|\w+\.pooler)\.")


def check_weights(weights: Weights, config: PretrainedConfig, auto_class: Any) -> None:
    """Refuse a checkpoint whose tensors are not exactly those of `auto_class`; log extra ones that change no score.

    The headers suffice, but for a head that is stored beside the embedding that it is tied to.

    Raises:
        ModelLoadError: names the number of wrong tensors, the first one and the likely cause.
    """
    path, stored, adapter = weights.path, weights.stored, weights.adapter
    needed = _needed(path, config, auto_class)
    if adapter is not None:
        adapter.check(needed)
    missing, extra = [name for name in needed if name not in stored], [name for name in stored if name not in needed]
    tied = {EMBEDDING, HEAD} & set(missing)
    if config.tie_word_embeddings and len(tied) == 1 and weights.files.keys() & {EMBEDDING, HEAD}:
        missing = [name for name in missing if name not in tied]
    if adapter is not None and HEAD not in needed:
        extra = [name for name in extra if name != HEAD]  # of the base; the adapter brings a score head
    _refuse_forms(path, stored, needed, extra)
    if missing:
        problem = f"{len(missing)} of the {len(needed)} weights that the model needs are not in {path}"
        cause = _cause(missing, needed, set(stored), config.num_hidden_layers)
        raise ModelLoadError(f"{problem}, the first is {missing[0]}: {cause}")
    for name, shape in needed.items():
        if name in stored and stored[name].shape != shape:
            fields = "hidden_size, head_dim, intermediate_size and vocab_size"
            problem = f"{name} is {list(stored[name].shape)} in {path}, and {list(shape)} by config.json"
            raise ModelLoadError(f"{problem}: they do not belong to one model (look at {fields})")
    _check_extra(path, stored, needed, extra, config)
    both = config.tie_word_embeddings and all(weights.source(name) == name for name in (EMBEDDING, HEAD))
    if both and not torch.equal(weights.unmerged(EMBEDDING), weights.unmerged(HEAD)):
        problem = "config.json ties %s to %s, but %s holds both with different values, so we will NOT tie them"
        logger.warning(problem + ": the model is scored with its own head", HEAD, EMBEDDING, path)


def _needed(path: Path, config: PretrainedConfig, auto_class: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model that config.json describes."""
    try:
        with torch.device("meta"):
            model = auto_class.from_config(copy.deepcopy(config), attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:  # of torch or transformers, for sizes that make no model
        raise ModelLoadError(f"{path / 'config.json'} describes no model: {first_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _inside(needed: Iterable[str]) -> tuple[str, ...]:
    """Return the prefixes of all tensors that would have a meaning for the model."""
    return (*_HEADS, *{f"{name.partition('.')[0]}." for name in needed})


def _refuse_forms(path: Path, stored: Mapping[str, Stored], needed: Iterable[str], extra: Iterable[str]) -> None:
    """Refuse the weights of an adapter, and quantised weights whose settings config.json has lost."""
    adapter = next(filter(_ADAPTER.search, extra), None)
    problem = f"{path} holds weights of an adapter that was not merged ({adapter})"
    refuse_if(adapter, f"{problem}: save the model after merge_and_unload()")
    quantized = [name for name in extra if name.startswith(_inside(needed)) and _QUANTIZED.search(name)]
    quantized += [name for name in needed if name in stored and stored[name].dtype not in FLOATS]
    for name in quantized[:1]:
        problem = f"{path} holds quantised weights ({name}, {stored[name].dtype})"
        raise ModelLoadError(f"{problem}, and config.json has lost its quantization_config: {UNQUANTIZED}")


def _cause(missing: list[str], needed: Iterable[str], names: set[str], layers: int) -> str:
    """Return the likely cause of missing weights; `names` are in the files, `layers` is config.json's number."""
    first = missing[0]
    root, _, rest = first.partition(".")
    for name in names:
        if name.endswith(first):
            wrappers = "(PEFT: merge_and_unload(), torch.compile: _orig_mod, DataParallel: module)"
            prefix = name.removesuffix(first)
            return f"the names begin with {prefix!r}: remove it, or save the model without its wrapper {wrappers}"
    if rest in names:
        return f"the names lack '{root}.', as in an embedding model: use a reranker, or save the model with its head"
    if missing == [SCORE_HEAD]:
        return "save the head with the model, or set architectures in config.json to the causal model that it is"
    if all(map(_CLASSIFIER.match, missing)):
        return "the head was not saved, as in an embedding model: use a reranker, or save the model with its head"
    if any(name.endswith((".gamma", ".beta")) for name in names):
        return "norms have their old names, gamma and beta: load and save it with transformers (save_pretrained)"
    if missing == [HEAD]:
        return 'save the head with the model, or write "tie_word_embeddings": true in config.json if it is tied'
    stored = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    absent = [int(match[1]) for name in missing if (match := _LAYER.match(name))]
    if stored and len(absent) == len(missing) and min(absent) > max(stored):
        return f"the files hold {1 + max(stored)} layers and config.json has {layers}: {_OTHER_SIZE}"
    if names.isdisjoint({EMBEDDING, HEAD} if EMBEDDING in needed else needed):
        return f"the names, such as {min(names, default='')[:80]}, are another program's: convert with save_pretrained"
    return f"a part of the model was not saved or not downloaded: {AGAIN}"


def _check_extra(
    path: Path, stored: Mapping[str, Stored], needed: Iterable[str], extra: list[str], config: PretrainedConfig
) -> None:
    """Refuse tensors that would have changed the scores, and log the others."""
    others = [name for name in extra if not _HARMLESS.search(name)]
    inside = [name for name in others if name.startswith(_inside(needed))]
    logits = [(1, config.hidden_size), (2, config.hidden_size)]
    heads = [name for name in others if stored[name].shape in logits and not _OTHER_HEAD.search(name)]
    for first in inside + heads:
        layer, layers = _LAYER.match(first), config.num_hidden_layers
        causes = (
            (layer and int(layer[1]) >= layers, f"config.json has {layers} layers only: {_OTHER_SIZE}"),
            (re.search(r"self_attn.*\.bias$", first), "the model has no biases by config.json (attention_bias)"),
            (
                first.startswith(_HEADS) or first in heads,
                "config.json describes a model without this head (architectures)",
            ),
            (True, "config.json does not describe them"),
        )
        cause = next(cause for condition, cause in causes if condition)
        raise ModelLoadError(f"{len(others)} weights in {path} would be ignored, the first is {first}: {cause}")
    if extra:
        first, level = (others or extra)[0], logging.WARNING if others else logging.INFO
        logger.log(level, "%d weights in %s are not part of the model and are ignored: %s", len(extra), path, first)
