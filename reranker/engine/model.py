"""Load a checked checkpoint: the decoder on its device, and the two-row head that reads "yes" and "no"."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model, Qwen3RMSNorm
from transformers.utils.logging import disable_progress_bar

from reranker.engine import device as devices
from reranker.engine.attention import Attention, choose
from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.config import Checkpoint
from reranker.engine.checkpoint.files import first_line
from reranker.engine.checkpoint.weights import check_weights, parameters
from reranker.engine.families.qwen3 import PLAIN, LayerFns, fuse, keep, last_hidden
from reranker.engine.graphs import Graphs
from reranker.engine.precision import QUANTIZED, short
from reranker.engine.quantized import quantize
from reranker.errors import ModelLoadError, ScoringError

logger = logging.getLogger(__name__)
disable_progress_bar()  # it writes half lines into the service's log


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
    stages: LayerFns = PLAIN
    """What runs around each layer's attention; speedup.py puts compiled ones here."""
    graphs: Graphs | None = None
    """Recorded passes for small batches; speedup.py puts them here."""
    static_prefix: Sequence[int] = ()
    """[P] tokens whose keys and values every layer keeps: requests are encoded, and batches packed, for them."""

    def keep(self, tokens: list[int]) -> None:
        """Compute what every prompt begins with once and for all, before anything is compiled or recorded."""
        keep(self.decoder, tokens, self.kernel)
        self.static_prefix = tokens

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
    def hidden(self, batch: PackedBatch, stages: LayerFns = PLAIN) -> Tensor:
        """[N, hidden_size] float32: last hidden states, normalised; `batch` is on the device."""
        hidden = last_hidden(self.decoder, batch, self.kernel, stages).float()
        norm = self.decoder.norm
        return F.rms_norm(hidden, (hidden.shape[-1],), norm.weight.float(), norm.variance_epsilon)


def load(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, yes: int, no: int, max_memory_percentage: float
) -> Model:
    """Load a checked checkpoint straight onto the device in the chosen precision, shard by shard.

    A quantised precision is made from the weights as they are stored, a layer at a time; each product is proved.

    Raises:
        ModelLoadError: the weights do not fit, are not those of the model, or the files are broken.
        ScoringError: this machine does not compute the quantised precision.
    """
    path, config = checkpoint.path, checkpoint.config
    between = QUANTIZED.get(dtype, dtype)
    stored = dtype
    if dtype in QUANTIZED:
        stored = config.dtype if isinstance(config.dtype, torch.dtype) else between
    check_weights(path, config)
    _check_memory(parameters(path) * stored.itemsize, stored, device, max_memory_percentage)
    try:
        with _own_report():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(path),
                config=config,
                dtype=stored,
                device_map={"": device},
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="sdpa",  # unused: reranker.engine.attention takes its place
                output_loading_info=True,
            )
    except torch.OutOfMemoryError as error:
        raise ModelLoadError(
            f"the weights do not fit beside what else is on {device}: free memory, or a smaller model"
        ) from error
    except Exception as error:  # of any library that reads one of the files
        raise ModelLoadError(f"cannot load the weights in {path}: {first_line(error)}") from error
    whole, report = loaded
    if absent := sorted(report["missing_keys"]):  # check_weights has not seen them, and they hold random numbers now
        raise ModelLoadError(f"{len(absent)} weights were not found in {path}, the first is {absent[0]}")
    whole.eval()
    rows = whole.lm_head.weight.detach()[[yes, no]].float()
    head = rows[0] - rows[1]
    if not head.any():
        raise ModelLoadError(
            f"lm_head in {path} has equal rows for yes and no, so that every score would be 0.5: it was not saved"
        )
    if dtype in QUANTIZED:
        _quantize(whole.model, dtype, between)
    else:
        fuse(whole.model)
    kernel, why = choose(device, between)
    logger.info("attention: %s", why)
    # Of an untied output matrix (8B: 1.2 GB) the two rows are all that is kept.
    return Model(whole.model, head, device, dtype, kernel)


def _check_memory(needed: int, stored: torch.dtype, device: torch.device, percentage: float) -> None:
    there = devices.memory(device, percentage)
    if needed > there.available:
        gib = 1 << 30
        raise ModelLoadError(
            f"the weights take {needed / gib:.1f} GiB in {short(stored)}, but only {there} on {device} "
            f"(MAX_MEMORY_PERCENTAGE={percentage:g} of {there.total / gib:.1f} GiB): raise it, free memory, "
            f"or use a smaller model"
        )


@contextmanager
def _own_report() -> Iterator[None]:
    """Drop transformers' report of missing and left-over tensors: check_weights has judged them."""
    report = logging.getLogger("transformers.modeling_utils")

    def other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    report.addFilter(other)
    try:
        yield
    finally:
        report.removeFilter(other)


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
