"""Load a checked checkpoint onto its device; run a packed batch through backbone and head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from reranker.engine import device as devices
from reranker.engine.attention import Attention, choose_kernel
from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.files import first_line
from reranker.engine.checkpoint.weights import check_weights, parameters
from reranker.engine.families.base import Backbone, Family, Head, LayerFns
from reranker.engine.graphs import Graphs
from reranker.engine.precision import QUANTIZED, short
from reranker.engine.quantized import quantize
from reranker.errors import ModelLoadError, ScoringError

logger = logging.getLogger(__name__)
disable_progress_bar()  # it writes partial lines into the service's log


@dataclass(slots=True)
class Model:
    """A loaded checkpoint: backbone, head and attention kernel."""

    backbone: Backbone
    head: Head
    device: torch.device
    dtype: torch.dtype
    """Precision of the layers' products."""
    kernel: type[Attention]
    compiled: LayerFns | None = None
    """Compiled layers, set by acceleration.py; None: the eager path."""
    graphs: Graphs | None = None
    """Recorded passes for small batches, set by acceleration.py."""
    static_prefix: Sequence[int] = ()
    """[P] tokens whose keys and values every layer has cached; requests are encoded, and batches packed, for them."""

    def cache_prefix(self, tokens: list[int]) -> None:
        """Compute the start of every prompt once; call it before anything is compiled or recorded."""
        self.backbone.cache_prefix(tokens, self.kernel)
        self.static_prefix = tokens

    @torch.inference_mode()
    def forward(self, batch: PackedBatch) -> Tensor:
        """[N] float32 logits of the batch's documents, on the device.

        The head runs in float32, because a bfloat16 softmax would tie scores.
        """
        recorded = None if self.graphs is None else self.graphs.replay(batch)
        if recorded is not None:
            return self.head.logits(recorded)
        if self.compiled is None:
            return self.head.logits(self.hidden(batch.to(self.device)))
        with torch.compiler.set_stance("eager_on_recompile"):  # a request must not wait for the compiler
            return self.head.logits(self.hidden(batch.to(self.device), self.compiled))

    @torch.inference_mode()
    def hidden(self, batch: PackedBatch, layer_fns: LayerFns | None = None) -> Tensor:
        """[N, hidden_size] float32: each document's last hidden state, normalised; `batch` is on the device."""
        return self.backbone.hidden(batch, self.kernel, layer_fns or self.backbone.eager)


def load(family: Family, device: torch.device, dtype: torch.dtype, max_memory_percentage: float) -> Model:
    """Load a checked checkpoint onto the device in the chosen precision, shard by shard.

    A quantised precision is made from the weights as stored, a layer at a time; each product is verified.

    Raises:
        ModelLoadError: the weights do not fit, are not those of the model, or the files are broken.
        ScoringError: this machine does not compute the quantised precision.
    """
    path, config = family.checkpoint.path, family.checkpoint.config
    compute_dtype = stored_dtype = QUANTIZED.get(dtype, dtype)
    if dtype in QUANTIZED and isinstance(config.dtype, torch.dtype):
        stored_dtype = config.dtype
    check_weights(path, config, family.auto_class)
    _check_memory(parameters(path) * stored_dtype.itemsize, stored_dtype, device, max_memory_percentage)
    whole = _from_pretrained(family, device, stored_dtype)
    head = family.head(whole)
    backbone = _backbone(family, whole, compute_dtype, dtype)
    kernel, reason = choose_kernel(device, compute_dtype)
    logger.info("attention: %s", reason)
    return Model(backbone, head, device, dtype, kernel)


def _check_memory(needed: int, stored: torch.dtype, device: torch.device, percentage: float) -> None:
    memory, gib = devices.memory(device, percentage), 1 << 30
    if needed > memory.available:
        limit = f"MAX_MEMORY_PERCENTAGE={percentage:g} of {memory.total / gib:.1f} GiB"
        problem = f"the weights take {needed / gib:.1f} GiB in {short(stored)}, but only {memory} on {device} ({limit})"
        raise ModelLoadError(f"{problem}: raise it, free memory, or use a smaller model")


def _from_pretrained(family: Family, device: torch.device, dtype: torch.dtype) -> Any:
    path, log = family.checkpoint.path, logging.getLogger("transformers.modeling_utils")

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    log.addFilter(is_other)  # check_weights has judged missing and unexpected tensors
    try:
        model, report = family.auto_class.from_pretrained(
            str(path),
            config=family.checkpoint.config,
            dtype=dtype,
            device_map={"": device},
            use_safetensors=True,
            trust_remote_code=False,
            attn_implementation="sdpa",  # unused: reranker.engine.attention replaces it
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        problem = f"the weights do not fit in the free memory of {device}"
        raise ModelLoadError(f"{problem}: free memory, or use a smaller model") from error
    except Exception as error:  # of any library that reads one of the files
        raise ModelLoadError(f"cannot load the weights in {path}: {first_line(error)}") from error
    finally:
        log.removeFilter(is_other)
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise ModelLoadError(f"{len(missing)} weights were not found in {path}, the first is {missing[0]}")
    return model.eval()


def _backbone(family: Family, model: Any, compute_dtype: torch.dtype, precision: torch.dtype) -> Backbone:
    quantized = precision in QUANTIZED
    try:
        backbone = family.backbone(model, compute_dtype, lambda p: quantize(p, precision) if quantized else p)
    except torch.OutOfMemoryError as error:
        raise ModelLoadError("the weights fit, but no copy of a layer beside them") from error
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        if not quantized:
            raise
        raise ScoringError(str(error).splitlines()[0]) from error  # a part of the kernel is missing
    if precision is torch.int8 and not torch.cpu._is_vnni_supported():
        logger.warning("int8: this processor has no VNNI (AVX-512): 7-bit activations, and less speed is gained")
    return backbone
