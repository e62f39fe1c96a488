"""The tensors in a checkpoint's files: their names, shapes and values, and whether they are those of the model.

transformers initialises missing tensors at random and reports them in a log line; here they are an error.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig

from reranker.engine.checkpoint.files import AGAIN, UNQUANTIZED, first_line, read_json, refuse_if
from reranker.engine.checkpoint.scales import Rounded, Scheme
from reranker.errors import ModelLoadError

if TYPE_CHECKING:
    from reranker.engine.checkpoint.adapter import Adapter

logger = logging.getLogger(__name__)

EMBEDDING, HEAD, SCORE_HEAD = "model.embed_tokens.weight", "lm_head.weight", "score.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_QUANTIZED = re.compile(
    r"(weight_scale|scale_inv|input_scale|weight_packed|weight_shape|weight_zero_point|qweight|qzeros|g_idx|scales|"
    r"biases|absmax|quant_map|quant_state)(\.|_|$)"
)
_ADAPTER = re.compile(r"(lora_|ia3_|prompt_encoder|base_layer|modules_to_save)", re.IGNORECASE)
_VALUE_HEAD = re.compile(r"(v_head|value_head)")
_MODEL = ("lm_head.", "score.", "classifier.", "model.")
"""A tensor with one of these prefixes that the model does not have would have changed the scores, except _HARMLESS."""
_HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$")
_OTHER_SIZE = "config.json belongs to a model of another size"
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class Stored(NamedTuple):
    """A tensor as the header of its file describes it."""

    shape: tuple[int, ...]
    dtype: str
    """In safetensors' notation: F32, BF16, ..."""

    @property
    def numel(self) -> int:
        """The number of values."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of a value; 1 for the types of quantised weights."""
        return FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 1


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
        for file in weight_files(path):
            header = read_header(file)
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
            ModelLoadError: the file is broken.
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
        with opened(self.files[name]) as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor

    def not_finite(self) -> str | None:
        """Return the name and file of the first tensor with a NaN or an infinity; None without any. Reads all."""
        for name in sorted(self.files, key=lambda name: (self.files[name], name)):
            if name in self.stored and not torch.isfinite(self.unmerged(name)).all():  # scales are checked as products
                return f"{name} in {self.files[name]}"
        return None if self.adapter is None else self.adapter.not_finite()


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
        cause = _cause(missing, set(stored), config.num_hidden_layers)
        raise ModelLoadError(f"{problem}, the first is {missing[0]}: {cause}")
    for name, shape in needed.items():
        if name in stored and stored[name].shape != shape:
            fields = "hidden_size, head_dim, intermediate_size and vocab_size"
            problem = f"{name} is {list(stored[name].shape)} in {path}, and {list(shape)} by config.json"
            raise ModelLoadError(f"{problem}: they do not belong to one model (look at {fields})")
    _check_extra(path, stored, extra, config)
    both = config.tie_word_embeddings and all(weights.source(name) == name for name in (EMBEDDING, HEAD))
    if both and not torch.equal(weights.unmerged(EMBEDDING), weights.unmerged(HEAD)):
        problem = "config.json ties %s to %s, but %s holds both with different values, so we will NOT tie them"
        logger.warning(problem + ": the model is scored with its own head", HEAD, EMBEDDING, path)


def read_header(file: Path) -> dict[str, Stored]:
    """Return every tensor of a *.safetensors by name.

    Raises:
        ModelLoadError: the file is broken.
    """
    stored: dict[str, Stored] = {}
    with opened(file) as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a dictionary
            part = tensors.get_slice(name)
            stored[name] = Stored(tuple(part.get_shape()), str(part.get_dtype()))
    return stored


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Open a *.safetensors.

    Raises:
        ModelLoadError: the file is broken, also where it is read inside the context.
    """
    try:
        with safe_open(str(file), framework="pt") as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{file} is broken or half downloaded ({error}): download it again") from error


def _needed(path: Path, config: PretrainedConfig, auto_class: Any) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model that config.json describes."""
    try:
        with torch.device("meta"):
            model = auto_class.from_config(copy.deepcopy(config), attn_implementation="sdpa", dtype=torch.float32)
    except Exception as error:  # of torch or transformers, for sizes that make no model
        raise ModelLoadError(f"{path / 'config.json'} describes no model: {first_line(error)}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _refuse_forms(path: Path, stored: Mapping[str, Stored], needed: Iterable[str], extra: Iterable[str]) -> None:
    """Refuse the weights of an adapter, and quantised weights whose settings config.json has lost."""
    adapter = next(filter(_ADAPTER.search, extra), None)
    problem = f"{path} holds weights of an adapter that was not merged ({adapter})"
    refuse_if(adapter, f"{problem}: save the model after merge_and_unload()")
    quantized = [name for name in extra if name.startswith(_MODEL) and _QUANTIZED.search(name)]
    quantized += [name for name in needed if name in stored and stored[name].dtype not in FLOATS]
    for name in quantized[:1]:
        problem = f"{path} holds quantised weights ({name}, {stored[name].dtype})"
        raise ModelLoadError(f"{problem}, and config.json has lost its quantization_config: {UNQUANTIZED}")


def _cause(missing: list[str], names: set[str], layers: int) -> str:
    """Return the likely cause of missing weights; `names` are in the files, `layers` is config.json's number."""
    first = missing[0]
    for name in names:
        if name.endswith(first):
            wrappers = "(PEFT: merge_and_unload(), torch.compile: _orig_mod, DataParallel: module)"
            prefix = name.removesuffix(first)
            return f"the names begin with {prefix!r}: remove it, or save the model without its wrapper {wrappers}"
    if first.removeprefix("model.") in names:
        return "the names lack 'model.', as in an embedding model: use a reranker, or save the model with its head"
    if missing == [SCORE_HEAD]:
        return "save the head with the model, or set architectures in config.json to the causal model that it is"
    if missing == [HEAD]:
        return 'save the head with the model, or write "tie_word_embeddings": true in config.json if it is tied'
    stored = {int(match[1]) for name in names if (match := _LAYER.match(name))}
    absent = [int(match[1]) for name in missing if (match := _LAYER.match(name))]
    if stored and len(absent) == len(missing) and min(absent) > max(stored):
        return f"the files hold {1 + max(stored)} layers and config.json has {layers}: {_OTHER_SIZE}"
    if names.isdisjoint({EMBEDDING, HEAD}):
        return f"the names, such as {min(names, default='')[:80]}, are another program's: convert with save_pretrained"
    return f"a part of the model was not saved or not downloaded: {AGAIN}"


def _check_extra(path: Path, stored: Mapping[str, Stored], extra: list[str], config: PretrainedConfig) -> None:
    """Refuse tensors that would have changed the scores, and log the others."""
    inside = [name for name in extra if name.startswith(_MODEL) and not _HARMLESS.search(name)]
    logits = [(1, config.hidden_size), (2, config.hidden_size)]
    heads = [name for name in extra if stored[name].shape in logits and not _VALUE_HEAD.search(name)]
    for first in inside + heads:
        layer, layers = _LAYER.match(first), config.num_hidden_layers
        causes = (
            (layer and int(layer[1]) >= layers, f"config.json has {layers} layers only: {_OTHER_SIZE}"),
            (re.search(r"self_attn.*\.bias$", first), "the model has no biases by config.json (attention_bias)"),
            (not first.startswith("model."), "config.json describes a model without this head (architectures)"),
            (True, "config.json does not describe them"),
        )
        cause = next(cause for condition, cause in causes if condition)
        raise ModelLoadError(f"{len(extra)} weights in {path} would be ignored, the first is {first}: {cause}")
    if extra:
        logger.warning("%d weights in %s are not part of the model and are ignored: %s", len(extra), path, extra[0])
