"""Choose the precision: a table of names, hardware requirements, and the fallbacks with their reasons."""

from __future__ import annotations

from collections.abc import Callable

import torch

from reranker.engine.device import Choice

FLOAT8 = torch.float8_e4m3fn
WIDENED = torch.bits16
"""Stands for float32 with 16-bit weights, as they are stored, each widened before its product; no tensor has it."""
PRECISIONS = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "int8": torch.int8,
    "float8": FLOAT8,
    "float32-w16": WIDENED,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": FLOAT8,
}
"""The values of MODEL_PRECISION besides `auto`."""
QUANTIZED = {torch.int8: torch.float32, FLOAT8: torch.bfloat16}
"""Precisions of the layers' products only, and what is between the products; of int8 on a GPU see `between`."""
_MIN_CAPABILITY = {
    torch.int8: (7, 5, "Turing"),
    torch.bfloat16: (8, 0, "Ampere"),
    FLOAT8: (8, 9, "Ada, Hopper"),
}
"""Compute capabilities. Emulated bfloat16 is slower than float16; `_scaled_mm` takes a scale per row from 8.9 on."""
_HALVES = (torch.bfloat16, torch.float16)
_NARROW = (FLOAT8, torch.int8)
"""Of 8 bits, the preferred one first. Without outliers int8 is the more exact one (1.2 % against 3.7 % of a product's
norm; also for the logits of the demo), but its error grows with the largest activation of a token: above 20 standard
deviations it is the larger one, and large models are known for such activations. float8's never exceeds 3.8 %.
Measured by `python -m benchmarks.int8 --errors`."""


def choose_precisions(
    wanted: str,
    device: torch.device,
    stored: torch.dtype | None = None,
    fits: Callable[[torch.dtype], bool] = lambda dtype: True,
) -> list[Choice[torch.dtype]]:
    """Return the precisions to try in order; each is for the case that the one before it fails at warm-up.

    Args:
        wanted: `auto` or a key of PRECISIONS.
        device: where the model will run.
        stored: int8 or float8, if the checkpoint's weights can be multiplied as they are stored; bfloat16 or float16,
            if all are stored so.
        fits: whether the model fits into the device's memory in a precision; on a CPU, comfortably.
    """
    automatic = _automatic(device, stored, fits)
    best = automatic[0]
    if wanted == "auto":
        first = _stored(stored, device, best) if stored in _NARROW else best
    elif reason := _refused(PRECISIONS[wanted], device, stored):
        first = Choice(best.value, f"{wanted} {reason}; {best.reason}")
    else:
        first = Choice(PRECISIONS[wanted], "requested")
    choices = [first]
    rest = [choice.value for choice in automatic] if first.value in QUANTIZED else []
    for dtype in (*rest, torch.float32):
        if dtype not in [choice.value for choice in choices]:
            choices.append(Choice(dtype, f"{short(choices[-1].value)} failed"))
    return choices


def between(precision: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the precision of everything between the products of the layers."""
    if precision is torch.int8 and device.type == "cuda":
        return _widest(device).value
    if precision is WIDENED:
        return torch.float32
    return QUANTIZED.get(precision, precision)


def computable(device: torch.device, stored: torch.dtype | None = None) -> list[torch.dtype]:
    """Return the precisions that a device computes and that are worth their memory, the most exact ones first.

    `stored` is that of `choose_precisions`.
    """
    wide = torch.bfloat16 if device.type == "cpu" else _widest(device).value
    others = (dtype for dtype in (WIDENED, wide, *_NARROW) if not _refused(dtype, device, stored))
    return [torch.float32, *others]


def short(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> 'bfloat16'; torch.float8_e4m3fn -> 'float8'; WIDENED -> 'float32-w16'"""
    if dtype is WIDENED:
        return "float32-w16"
    return str(dtype).removeprefix("torch.").removesuffix("_e4m3fn")


def _automatic(
    device: torch.device, stored: torch.dtype | None, fits: Callable[[torch.dtype], bool]
) -> list[Choice[torch.dtype]]:
    """Return what `auto` takes, the best first: on a GPU whose memory is too small for 16 bits, 8 bits."""
    if device.type == "cpu":
        return [_automatic_on_cpu(stored, fits)]
    wide = _widest(device)
    if fits(wide.value):
        return [wide]
    reason = f"auto: the model does not fit into the memory in {short(wide.value)}, but in"
    narrow = [dtype for dtype in _NARROW if not _unsupported(dtype, device) and fits(dtype)]
    return [*(Choice(dtype, f"{reason} {short(dtype)}") for dtype in narrow), wide]


def _automatic_on_cpu(stored: torch.dtype | None, fits: Callable[[torch.dtype], bool]) -> Choice[torch.dtype]:
    """Return bfloat16 with AMX, else float32; with 16-bit weights where float32 needs too much of the memory."""
    if torch.cpu._is_amx_tile_supported():
        return Choice(torch.bfloat16, "auto: the processor multiplies bfloat16 in hardware (AMX)")
    if stored in _HALVES and not fits(torch.float32):
        cost = "the scores are float32's, and passes take longer, those of few tokens most"
        return Choice(
            WIDENED, f"auto: float32 would take too much of the memory, so the weights stay in 16 bits: {cost}"
        )
    if torch.cpu._is_avx512_bf16_supported():
        faster = "MODEL_PRECISION=bfloat16 is faster on this processor (AVX512_BF16), and less exact"
        return Choice(torch.float32, f"auto: exact scores; {faster}")
    return Choice(torch.float32, "auto: the processor has no bfloat16 products (no AMX, no AVX512_BF16)")


def _widest(device: torch.device) -> Choice[torch.dtype]:
    """Return the 16-bit precision of a GPU."""
    if _unsupported(torch.bfloat16, device):
        return Choice(torch.float16, "auto: the GPU has no bfloat16")
    return Choice(torch.bfloat16, "auto: the GPU has bfloat16")


def _stored(stored: torch.dtype, device: torch.device, best: Choice[torch.dtype]) -> Choice[torch.dtype]:
    """Return the precision of a quantised checkpoint's weights where it is the fastest one, else the best."""
    if reason := _unsupported(stored, device):
        return Choice(best.value, f"{best.reason}; {short(stored)}, as the weights are stored, {reason}")
    if stored is torch.int8 and device.type == "cpu" and not torch.cpu._is_vnni_supported():
        gain = "int8, as the weights are stored, has 7-bit activations without VNNI, and gains little"
        return Choice(best.value, f"{best.reason}; {gain}")
    return Choice(stored, "auto: the weights are stored so")


def _refused(dtype: torch.dtype, device: torch.device, stored: torch.dtype | None) -> str:
    """Return why a device cannot compute a checkpoint in a precision, or ''."""
    if dtype is not WIDENED:
        return _unsupported(dtype, device)
    if device.type != "cpu":
        return "is for CPUs only"
    return "" if stored in _HALVES else "is for weights that are all stored in bfloat16, or all in float16"


def _unsupported(dtype: torch.dtype, device: torch.device) -> str:
    """Return why a device cannot compute a precision, or ''. The proof at load (quantized.py) has the last word."""
    if device.type != "cuda":
        return "is for NVIDIA GPUs only" if dtype is FLOAT8 else ""
    major, minor, names = _MIN_CAPABILITY.get(dtype, (0, 0, ""))
    supported = torch.cuda.get_device_capability(device) >= (major, minor)
    return "" if supported else f"needs compute capability {major}.{minor} ({names})"
