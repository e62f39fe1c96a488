"""Load a checked checkpoint onto its device; run a packed batch through backbone and head."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar

from reranker.engine import device as devices
from reranker.engine.attention import Attention, choose_kernel
from reranker.engine.batch import PackedBatch
from reranker.engine.bidirectional import choose_pair_kernel
from reranker.engine.checkpoint.inventory import check_weights
from reranker.engine.checkpoint.scales import Layout, Scheme
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.families.base import Backbone, Family, Head, LayerFns
from reranker.engine.families.loader import Loader
from reranker.engine.families.official import largest_official
from reranker.engine.footprint import Footprint, footprint
from reranker.engine.graphs import Graphs
from reranker.engine.linear import CpuLinear, WideningLinear, choose_product
from reranker.engine.precision import QUANTIZED, WIDENED, between, computable, short
from reranker.engine.quantized import quantize
from reranker.errors import ModelLoadError, ScoringError

logger = logging.getLogger(__name__)
disable_progress_bar()  # also a download's: it writes partial lines into the service's log

_GIB = 1 << 30


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
            raise ModelLoadError(f"{problem} on {self.device}: {devices.MORE_MEMORY}") from error
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


def load(
    family: Family, device: torch.device, dtype: torch.dtype, max_memory_percentage: float, prefix_tokens: int = 0
) -> Model:
    """Load a checkpoint onto the device in the chosen precision, a layer at a time.

    A quantised precision is made from the weights, or is that of a quantised checkpoint; each product is verified.

    Args:
        family: the checkpoint.
        device: where it runs.
        dtype: its precision.
        max_memory_percentage: see `Scorer.load`.
        prefix_tokens: the length of the static prefix that will be cached.

    Raises:
        ModelLoadError: the model does not fit, the weights are not its own, or the files are broken.
        ScoringError: this machine does not compute the quantised precision.
    """
    weights = Weights(family.checkpoint.path, family.checkpoint.adapter, family.checkpoint.scheme)
    check_weights(weights, family.checkpoint.config, family.auto_class)
    needs = partial(needed_memory, family, weights, device, prefix_tokens=prefix_tokens)
    _check_memory(needs, dtype, device, max_memory_percentage, weights.half)
    if family.checkpoint.scheme is not None:
        _log_quantized(weights, family.checkpoint.scheme, dtype, needs(dtype))
    head = family.head(weights)
    try:
        head = replace(head, weight=head.weight.to(device))
        backbone = _backbone(family, weights, device, dtype)
    except RuntimeError as error:
        if not devices.out_of_memory(error):
            raise
        problem = f"the weights do not fit in the free memory of {device}"
        raise ModelLoadError(f"{problem}: {devices.MORE_MEMORY}") from error
    choose = choose_kernel if backbone.causal else choose_pair_kernel
    kernel, reason = choose(device, between(dtype, device), backbone.head_dim)
    logger.info("model: %s; score: %s; prompt: %s", family.name, head.name, family.template.source)
    logger.info("attention: %s", reason)
    return Model(backbone, head, device, dtype, kernel, family=family.name)


def needed_memory(
    family: Family, weights: Weights, device: torch.device, precision: torch.dtype, *, prefix_tokens: int
) -> Footprint:
    """Return what a model needs on a device in a precision; no weight is read."""
    on_cpu = device.type == "cpu"
    return footprint(weights, family.widths, precision, between(precision, device), prefix_tokens, on_cpu)


def _check_memory(
    needs: Callable[[torch.dtype], Footprint],
    precision: torch.dtype,
    device: torch.device,
    percentage: float,
    stored: torch.dtype | None,
) -> None:
    memory, need = devices.memory(device, percentage), needs(precision)
    if need.needed <= memory.available:
        return
    limit = f"MAX_MEMORY_PERCENTAGE={percentage:g} of {memory.total / _GIB:.1f} GiB"
    problem = f"the model needs {need} in {short(precision)}, but only {memory} on {device} ({limit})"
    sizes = {other: needs(other).needed for other in computable(device, stored)}
    for other, size in sizes.items():
        if size <= memory.available:
            fix = f"MODEL_PRECISION={short(other)} needs {size / _GIB:.2f} GiB; or raise it, or free memory"
            raise ModelLoadError(f"{problem}: {fix}")
    none = ", ".join(f"{short(other)} {size / _GIB:.2f}" for other, size in sizes.items())
    fix = f"raise it, free memory, or use a smaller model{largest_official(device, memory.available)}"
    raise ModelLoadError(f"{problem}, and none fits ({none} GiB): {fix}")


def _log_quantized(weights: Weights, scheme: Scheme, precision: torch.dtype, need: Footprint) -> None:
    """Say what becomes of the weights of a quantised checkpoint."""
    layout = cast("Layout", weights.layout)
    use = f"widened by their scales, and rounded{' again' if precision in QUANTIZED else ''} to {short(precision)}"
    if weights.precision is precision:
        use = f"taken as they are stored, in {short(precision)}"
    logger.info("quantised weights (%s) are %s: %.2f GiB with the others", scheme.name, use, need.weights / _GIB)
    if layout.unused:
        unused = "%d scales of activations and caches are not used (%s): activations are %s"
        rounding = "rounded with a scale per token" if precision in QUANTIZED else "not rounded"
        logger.info(unused, len(layout.unused), layout.unused[0], rounding)


def _cpu_backbone(family: Family, weights: Weights, device: torch.device, precision: torch.dtype) -> Backbone:
    linears: list[CpuLinear | WideningLinear] = []
    kind, stored = (WideningLinear, weights.dtype) if precision is WIDENED else (CpuLinear, precision)

    def wrap(linear: nn.Linear, names: Sequence[str]) -> nn.Module:
        linears.append(kind(linear))
        return linears[-1]

    backbone = family.backbone(Loader(weights, device, stored, between(precision, device), wrap))
    if precision is not torch.bfloat16:
        choose_product(linears)
    return backbone


def _backbone(family: Family, weights: Weights, device: torch.device, precision: torch.dtype) -> Backbone:
    compute = between(precision, device)
    if device.type == "cpu" and precision in (torch.float32, torch.bfloat16, WIDENED):
        return _cpu_backbone(family, weights, device, precision)
    if precision not in QUANTIZED:
        return family.backbone(Loader(weights, device, precision, compute))

    def wrap(linear: nn.Linear, names: Sequence[str]) -> nn.Module:
        if weights.precision is not precision:
            return quantize(linear, precision)
        stored = weights.rounded(*names)  # None: the checkpoint keeps this projection wide
        return linear.to(compute) if stored is None else quantize(linear, precision, stored.to(device))

    try:
        backbone = family.backbone(Loader(weights, device, weights.dtype, compute, wrap))
    except (RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        if devices.out_of_memory(error) or devices.lost(error):
            raise
        raise ScoringError(str(error).splitlines()[0]) from error  # a part of the kernel is missing
    if precision is torch.int8 and device.type == "cpu" and not torch.cpu._is_vnni_supported():
        logger.warning("int8: this processor has no VNNI (AVX-512): 7-bit activations, and less speed is gained")
    return backbone
