"""Load a checked checkpoint onto its device; run a packed batch through backbone and head."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from reranker.engine import device as devices
from reranker.engine.attention import Attention, choose_kernel
from reranker.engine.batch import PackedBatch
from reranker.engine.checkpoint.weights import EMBEDDING, HEAD, Weights, check_weights
from reranker.engine.families.base import Backbone, Family, Head, LayerFns
from reranker.engine.graphs import Graphs
from reranker.engine.precision import FLOAT8, QUANTIZED, short
from reranker.engine.quantized import quantize
from reranker.errors import ModelLoadError, ScoringError

logger = logging.getLogger(__name__)
disable_progress_bar()  # also a download's: it writes partial lines into the service's log

_SCALE_BYTES = 16
"""Of a quantised projection for each output: scale, zero point and the kernel's own sum."""
_QUANTIZING_BYTES = {torch.int8: 14, FLOAT8: 10}
"""For each weight of a projection while it is quantised: as stored, in float32, scaled, and rounded (quantized.py)."""


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
    family: str = ""
    """Name of the model family."""
    static_prefix: Sequence[int] = ()
    """[P] tokens whose keys and values every layer has cached; requests are encoded, and batches packed, for them."""

    def cache_prefix(self, tokens: list[int]) -> None:
        """Compute the start of every prompt once; call it before anything is compiled or recorded.

        Raises:
            ModelLoadError: the device has no memory for it.
        """
        try:
            self.backbone.cache_prefix(tokens, self.kernel)
        except RuntimeError as error:
            if not devices.out_of_memory(error):
                raise
            problem = f"the weights fit, but not the {len(tokens)} tokens of the prompt's start beside them"
            raise ModelLoadError(f"{problem}: free memory of {self.device}, or use a smaller model") from error
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
    """Load a checkpoint onto the device in the chosen precision, a layer at a time.

    A quantised precision is made from the weights as stored; each product is verified.

    Raises:
        ModelLoadError: the weights do not fit, are not those of the model, or the files are broken.
        ScoringError: this machine does not compute the quantised precision.
    """
    weights = Weights(family.checkpoint.path, family.checkpoint.adapter)
    check_weights(weights, family.checkpoint.config, family.auto_class)
    _check_memory(weights, dtype, device, max_memory_percentage)
    head = family.head(weights)
    try:
        head = replace(head, weight=head.weight.to(device))
        backbone = _backbone(family, weights, device, dtype)
    except RuntimeError as error:
        if not devices.out_of_memory(error):
            raise
        problem = f"the weights do not fit in the free memory of {device}"
        raise ModelLoadError(f"{problem}: free memory, or use a smaller model") from error
    kernel, reason = choose_kernel(device, QUANTIZED.get(dtype, dtype))
    logger.info("model: %s; score: %s; prompt: %s", family.name, head.name, family.template.source)
    logger.info("attention: %s", reason)
    return Model(backbone, head, device, dtype, kernel, family=family.name)


def needed_memory(weights: Weights, precision: torch.dtype) -> int:
    """Return the bytes on the device, at most, while the weights are loaded; the activations come on top.

    They are those of the loaded weights; and if these are quantised, those of the largest projection in work: q, k, v
    or gate, up, which are joined and never smaller than the others.
    """
    dtype, quantized = QUANTIZED.get(precision, precision), precision in QUANTIZED
    needed, products = 0, Counter[str]()
    for name, stored in weights.stored.items():
        if name == weights.source(EMBEDDING):
            needed += stored.numel * min(stored.itemsize, dtype.itemsize)
        elif name.endswith("_proj.weight"):
            needed += stored.numel * precision.itemsize + quantized * stored.shape[0] * _SCALE_BYTES
            if not name.endswith(("o_proj.weight", "down_proj.weight")):
                products[name.rsplit(".", 2)[0]] += stored.numel
        elif name != HEAD:
            needed += stored.numel * dtype.itemsize
    return needed + max(products.values(), default=0) * _QUANTIZING_BYTES.get(precision, 0)


def _check_memory(weights: Weights, precision: torch.dtype, device: torch.device, percentage: float) -> None:
    memory, gib, needed = devices.memory(device, percentage), 1 << 30, needed_memory(weights, precision)
    if needed > memory.available:
        limit = f"MAX_MEMORY_PERCENTAGE={percentage:g} of {memory.total / gib:.1f} GiB"
        problem = (
            f"the weights take {needed / gib:.1f} GiB in {short(precision)}, but only {memory} on {device} ({limit})"
        )
        raise ModelLoadError(f"{problem}: raise it, free memory, or use a smaller model")


def _backbone(family: Family, weights: Weights, device: torch.device, precision: torch.dtype) -> Backbone:
    if precision not in QUANTIZED:
        return family.backbone(weights, device, precision, precision, lambda linear: linear)
    try:
        backbone = family.backbone(
            weights, device, weights.dtype, QUANTIZED[precision], lambda linear: quantize(linear, precision)
        )
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        if isinstance(error, RuntimeError) and devices.out_of_memory(error):
            raise
        raise ScoringError(str(error).splitlines()[0]) from error  # a part of the kernel is missing
    if precision is torch.int8 and not torch.cpu._is_vnni_supported():
        logger.warning("int8: this processor has no VNNI (AVX-512): 7-bit activations, and less speed is gained")
    return backbone
