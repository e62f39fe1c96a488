"""Loading: a hub name or a folder becomes the decoder on its device, and the two-row head that reads "yes" and "no"."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm
from transformers.utils.logging import disable_progress_bar

from reranker.engine import device as devices
from reranker.engine.attention import Attention, choose
from reranker.engine.graphs import Graphs
from reranker.engine.packing import PackedBatch
from reranker.engine.quantized import quantize
from reranker.engine.qwen3 import PLAIN, Stages, fuse, keep, last_hidden
from reranker.errors import ModelLoadError, ScoringError

logger = logging.getLogger(__name__)
disable_progress_bar()  # it writes half lines into the service's log

_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "vocab.json",
]
_DOWNLOAD = (
    "download it first, for example `hf download Qwen/Qwen3-Reranker-4B --local-dir {path}` "
    "or `modelscope download --model Qwen/Qwen3-Reranker-4B --local_dir {path}`"
)


def locate(name: str, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a local folder as it is, a hub name downloaded (or found in the hub's cache).

    Raises:
        ModelLoadError: the folder does not exist or is incomplete, or the hub has or gives no such model.
    """
    path = Path(name).expanduser()
    looks_like_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not name.startswith(".")
    if path.is_dir():
        if not (path / "config.json").is_file() or not list(path.glob("*.safetensors")):
            raise ModelLoadError(f"{path} holds no config.json or no *.safetensors: {_DOWNLOAD.format(path=path)}")
        return path
    if not looks_like_hub or path.parent.is_dir():
        raise ModelLoadError(f"the model folder {path} does not exist: {_DOWNLOAD.format(path=path)}")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES))
    except Exception as error:  # every failure of the hub's client means the same here: no model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(
            f"cannot download {name}: {reason[0]} (behind a firewall set HF_ENDPOINT to a mirror, "
            f"or download it elsewhere and set MODEL_NAME_OR_PATH to the folder)"
        ) from error


@dataclass(slots=True)
class Model:
    """A loaded checkpoint: decoder, attention kernel and head. `forward` is what it is for."""

    decoder: Qwen3Model
    head: Tensor
    """[hidden_size] float32: W[yes] - W[no]"""
    device: torch.device
    dtype: torch.dtype
    """Precision of the layers' products."""
    kernel: type[Attention]
    stages: Stages = PLAIN
    """What runs around each layer's attention; speedup.py puts compiled ones here."""
    graphs: Graphs | None = None
    """Recorded passes for small batches; speedup.py puts them here."""
    preamble: Sequence[int] = ()
    """[P] tokens whose keys and values every layer keeps: requests are encoded, and batches packed, for them."""

    def keep(self, tokens: list[int]) -> None:
        """Compute what every prompt begins with once and for all, before anything is compiled or recorded."""
        keep(self.decoder, tokens, self.kernel)
        self.preamble = tokens

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> Tensor:
        """[N] float32 logits (yes minus no) of the batch's documents, on the device.

        The head is two rows of the output matrix, not 151,669, and runs in float32: the card's softmax over the two
        logits is the sigmoid of their difference, and a bfloat16 one would tie scores.
        """
        recorded = None if self.graphs is None else self.graphs.replay(batch)
        if recorded is not None:
            return recorded @ self.head
        if self.stages is PLAIN:
            return self.hidden(batch.to(self.device)) @ self.head
        with torch.compiler.set_stance("eager_on_recompile"):  # nobody waits for a compiler
            return self.hidden(batch.to(self.device), self.stages) @ self.head

    @torch.inference_mode()
    def hidden(self, batch: PackedBatch, stages: Stages = PLAIN) -> Tensor:
        """[N, hidden_size] float32: last hidden states, normalised; `batch` is on the device."""
        hidden = last_hidden(self.decoder, batch, self.kernel, stages).float()
        norm = self.decoder.norm
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight.float(), norm.variance_epsilon)


def check(path: Path) -> None:
    """Refuse what is not a Qwen3-Reranker checkpoint before anything of it is built.

    Raises:
        ModelLoadError: another architecture, or one that needs code from the checkpoint, or weights that are not in
            safetensors.
    """
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelLoadError(f"{path / 'config.json'} is not JSON: download the checkpoint again") from error
    kind = config.get("model_type")
    if kind != "qwen3":
        raise ModelLoadError(
            f"model_type is {kind!r}, not 'qwen3': this service runs Qwen3-Reranker (0.6B, 4B, 8B) only"
        )
    if "Qwen3ForCausalLM" not in (config.get("architectures") or ["Qwen3ForCausalLM"]):
        raise ModelLoadError(
            f"{config['architectures']} is a converted model: use the original Qwen3ForCausalLM weights"
        )
    if config.get("use_sliding_window"):
        raise ModelLoadError("use_sliding_window is set: no Qwen3-Reranker has sliding attention")
    for index in path.glob("*.safetensors.index.json"):
        _check_index(index)


def _check_index(index: Path) -> None:
    """transformers opens whatever the index of the shards names, and unpickles what is not called *.safetensors."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{index} is not an index of shards: download the checkpoint again") from error
    if not all(isinstance(name, str) and re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise ModelLoadError(f"{index} names files that are not *.safetensors beside it: nothing else is read")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The checkpoint's own fast tokenizer.

    Raises:
        ModelLoadError: its files are missing or broken.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(path), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"no usable tokenizer in {path}: {str(error).splitlines()[0]}") from error
    return tokenizer


def load(
    path: Path, device: torch.device, dtype: torch.dtype, yes: int, no: int, max_memory_percentage: float
) -> Model:
    """Load a checked checkpoint straight onto the device in the chosen precision, shard by shard.

    A quantised precision is made from the weights as they are stored, a layer at a time; each product is proved.

    Raises:
        ModelLoadError: the weights do not fit, or the files are broken.
        ScoringError: this machine does not compute the quantised precision.
    """
    config = AutoConfig.from_pretrained(str(path), trust_remote_code=False)
    between = devices.QUANTIZED.get(dtype, dtype)
    stored = (config.dtype or between) if dtype in devices.QUANTIZED else dtype
    needed = parameters(path) * stored.itemsize
    there = devices.memory(device, max_memory_percentage)
    if needed > there.left:
        gib = 1 << 30
        raise ModelLoadError(
            f"the weights take {needed / gib:.1f} GiB in {devices.short(stored)}, but only {there} on {device} "
            f"(MAX_MEMORY_PERCENTAGE={max_memory_percentage:g} of {there.total / gib:.1f} GiB): raise it, free memory, "
            f"or use a smaller model"
        )
    try:
        whole = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=stored,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",  # unused: reranker.engine.attention takes its place
        ).eval()
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"the weights do not fit beside what else is on {device}: free memory, or a smaller model"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"cannot load the weights in {path}: {str(error).splitlines()[0]}") from error
    rows = whole.lm_head.weight.detach()[[yes, no]].float()
    if dtype in devices.QUANTIZED:
        _quantize(whole.model, dtype, between)
    else:
        fuse(whole.model)
    kernel, reason = choose(device, between)
    logger.info("attention: %s", reason)
    # Of an untied output matrix (8B: 1.2 GB) the two rows are all that is kept.
    return Model(whole.model, rows[0] - rows[1], device, dtype, kernel)


def _quantize(decoder: Qwen3Model, precision: torch.dtype, between: torch.dtype) -> None:
    try:
        fuse(decoder, lambda linear: quantize(linear, precision))
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
        AttributeError,
    ) as error:  # whichever part of the kernel is missing
        if isinstance(error, torch.OutOfMemoryError):
            raise ModelLoadError("the weights fit, but not one layer's quantised copy beside them") from error
        raise ScoringError(str(error).splitlines()[0]) from error
    for module in decoder.modules():
        if isinstance(module, Qwen3RMSNorm):  # the embeddings stay as they are stored; a row is cast when it is read
            module.to(between)
    if precision is torch.int8 and not torch.cpu._is_vnni_supported():
        logger.warning("int8: this processor has no VNNI (AVX-512): activations get 7 bits, and less time is gained")


def parameters(path: Path) -> int:
    """Number of weights in the safetensors files of a folder, from their headers alone."""
    total = 0
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(str(file), framework="pt") as tensors:
                total += sum(_count(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise ModelLoadError(f"{file} is broken or half downloaded ({error}): download it again") from error
    return total


def _count(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())
