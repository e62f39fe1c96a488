"""Read which quantised form a checkpoint has: 8-bit values times scales are read, others refused.

Source of the formats: compressed-tensors 0.20 (naive_quantized and mxfp8 compressors), transformers'
integrations/finegrained_fp8.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reranker.engine.checkpoint.scales import Block, Scheme, not_read

_METHOD_FILES = {
    "quantize_config.json": "GPTQ",
    "quant_config.json": "AWQ",
    "hf_quant_config.json": "NVIDIA ModelOpt",
    "quantization_config.json": "torchao",
}
_FORMATS = ("int-quantized", "float-quantized", "naive-quantized", "mxfp8-quantized", "mixed-precision")
_WEIGHT_FIELDS = {
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder",
    "scale_dtype", "zp_dtype", "observer", "observer_kwargs",
}  # fmt: skip


class _NotReadError(Exception):
    """Names the part of a format that is not read."""


def read_scheme(path: Path, settings: Mapping[str, Any]) -> Scheme | None:
    """Return the format that config.json describes; None if the weights are not quantised.

    Raises:
        ModelLoadError: the format is not read.
    """
    stored = settings.get("quantization_config", settings.get("compression_config"))
    if not isinstance(stored, dict):
        by_file = (method for name, method in _METHOD_FILES.items() if (path / name).exists())
        method = str(stored) if stored is not None else "MLX" if settings.get("quantization") else next(by_file, "")
        if method:
            raise not_read(path, method)
        return None
    bitsandbytes = any(str(key).startswith("load_in_") for key in stored)
    method = str(stored.get("quant_method") or ("bitsandbytes" if bitsandbytes else "unknown method"))
    read = {"compressed-tensors": _compressed_tensors, "fp8": _fp8}.get(method)
    try:
        if read is not None:
            return read(stored)
    except _NotReadError as error:
        method = f"{method}, {error}"
    raise not_read(path, method)


def _compressed_tensors(stored: Mapping[str, Any]) -> Scheme:
    """Read the settings that compressed-tensors writes; older ones are nested once more."""
    nested = stored.get("quantization_config")
    config = nested if isinstance(nested, dict) else stored
    sparsity, groups = stored.get("sparsity_config") or {}, config.get("config_groups")
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise _NotReadError("sparsity_config")
    if stored.get("transform_config"):
        raise _NotReadError("transform_config")
    form = str(config.get("format"))[:40]
    if not isinstance(groups, dict) or not all(isinstance(group, dict) for group in groups.values()):
        raise _NotReadError("without config_groups")
    blocks: dict[str, set[Block]] = {}
    asymmetric: set[str] = set()
    for group in groups.values():
        if (own := str(group.get("format") or form)[:40]) not in _FORMATS:
            raise _NotReadError(own)
        if (weights := group.get("weights")) is None:
            continue
        values = _values(weights)
        blocks.setdefault(values, set()).update(_blocks(weights))
        if not weights.get("symmetric", True):
            asymmetric.add(values)
    found = {values: frozenset(sizes) for values, sizes in blocks.items()}
    return Scheme(f"compressed-tensors, {form}", found, frozenset(asymmetric))


def _values(weights: Any) -> str:
    """Return the type of the values of a group in the files."""
    if not isinstance(weights, dict):
        raise _NotReadError("weights that are no object")
    if unknown := set(weights) - _WEIGHT_FIELDS:
        raise _NotReadError(f"weights with {min(unknown)[:40]}")
    kind, bits = str(weights.get("type", "int")).lower(), weights.get("num_bits", 8)
    values = {"int": "I8", "float": "F8_E4M3"}.get(kind)
    if bits != 8 or values is None:
        raise _NotReadError(f"{str(bits)[:10]} bits of type {kind[:10]}")
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise _NotReadError(f"actorder {str(weights['actorder'])[:20]}")
    if weights.get("dynamic"):
        raise _NotReadError("dynamic weights")
    return values


def _blocks(weights: Mapping[str, Any]) -> list[Block]:
    """Return the blocks of a group of compressed-tensors; none for a scale per tensor or per output."""
    size, structure = weights.get("group_size"), weights.get("block_structure")
    strategy = weights.get("strategy") or ("group" if size and size != -1 else "channel" if size else "tensor")
    if isinstance(structure, str):  # as older versions write it
        structure = [int(part) if part.isdecimal() else 0 for part in structure.split("x")]
    if strategy in ("tensor", "channel"):
        return []
    if strategy == "group":
        return [_block([1, size])]
    if strategy == "block":
        return [_block(structure)]
    raise _NotReadError(f"strategy {str(strategy)[:20]}")


def _block(sizes: Any) -> Block:
    if isinstance(sizes, list) and len(sizes) == 2 and all(type(size) is int and size > 0 for size in sizes):
        return sizes[0], sizes[1]
    raise _NotReadError(f"blocks of {str(sizes)[:40]}")


def _fp8(stored: Mapping[str, Any]) -> Scheme:
    """Read the settings of FP8 as transformers and vLLM write it: blocks, or one scale a weight without blocks."""
    if str(stored.get("fmt", "e4m3")) not in ("e4m3", "e4m3fn"):
        raise _NotReadError(f"fmt {str(stored['fmt'])[:20]}")
    sizes = stored.get("weight_block_size")
    return Scheme("fp8", {"F8_E4M3": frozenset([] if sizes is None else [_block(sizes)])})
