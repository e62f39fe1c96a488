"""Which quantised formats are read, by config.json alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from reranker import ModelLoadError
from reranker.engine.checkpoint.quantization import read_scheme
from tests.engine.quantization import FORMS, compressed_tensors, fp8, group

UP = "model.layers.0.mlp.up_proj.weight"
_WEIGHTS: list[tuple[dict[str, Any], str]] = [
    ({"num_bits": 4}, "4 bits of type int"),
    ({"type": "complex"}, "8 bits of type complex"),
    ({"strategy": "tensor_group"}, "strategy tensor_group"),
    ({"strategy": "group", "group_size": 0}, "blocks of [1, 0]"),
    ({"strategy": "block", "block_structure": "16xy"}, "blocks of [16, 0]"),
    ({"actorder": "group"}, "actorder group"),
    ({"dynamic": True}, "dynamic weights"),
    ({"rotation": 5}, "weights with rotation"),
]
"""Settings of weights that are not read."""
INT8, PER_OUTPUT = FORMS[0], {"W8A8", "FP8 dynamic", "FP8 static", "FP8 of vLLM", "a rounded cache"}


def refusal(path: Path, settings: dict[str, Any]) -> str:
    with pytest.raises(ModelLoadError) as caught:
        read_scheme(path, settings)
    return str(caught.value)


def test_settings_of_older_versions_are_read(tmp_path: Path) -> None:
    whole = compressed_tensors(group("float", "block", block_structure="16x8", actorder="weight"))
    older = {"quant_method": "compressed-tensors", "sparsity_config": {"format": "dense"}, "quantization_config": whole}
    scheme = read_scheme(tmp_path, {"compression_config": older})
    assert scheme is not None
    assert scheme.blocks == {"F8_E4M3": {(16, 8)}}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        *(
            ({"quantization_config": {"quant_method": method}}, f"({method})")
            for method in "gptq awq bitsandbytes torchao modelopt hqq quark auto-round fbgemm_fp8 mxfp4 bitnet".split()
        ),
        ({"quantization_config": {}}, "(unknown method)"),
        ({"quantization_config": {"load_in_8bit": True}}, "(bitsandbytes)"),
        ({"quantization_config": "gptq"}, "(gptq)"),
        ({"compression_config": {"quant_method": "sparseml"}}, "(sparseml)"),
        ({"quantization": {"bits": 8, "group_size": 64}}, "(MLX)"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "without config_groups"),
        ({"quantization_config": INT8.config | {"config_groups": [5]}}, "without config_groups"),
        *(
            ({"quantization_config": compressed_tensors(group("int", "group") | {"format": form})}, f", {form})")
            for form in "pack-quantized nvfp4-pack-quantized mxfp4-pack-quantized marlin-24 fakequant dense".split()
        ),
        *(
            ({"quantization_config": compressed_tensors(group("int", "channel", **changes))}, words)
            for changes, words in _WEIGHTS
        ),
        ({"quantization_config": compressed_tensors(group("int", "channel") | {"weights": 5})}, "no object"),
        ({"quantization_config": INT8.config | {"sparsity_config": {"format": "sparse-bitmask"}}}, "sparsity_config"),
        ({"quantization_config": INT8.config | {"transform_config": {"config_groups": {}}}}, "transform_config"),
        ({"quantization_config": fp8(fmt="e5m2")}, "fp8, fmt e5m2"),
        ({"quantization_config": fp8(weight_block_size=[128])}, "fp8, blocks of [128]"),
    ],
)  # fmt: skip
def test_other_formats_are_refused_with_the_way_out(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    message = refusal(tmp_path, settings)
    assert re.search(r"is a quantised checkpoint \(.*\), which is not read: use the original weights", message)
    assert words in message
    assert "MODEL_PRECISION=int8" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "method"),
    [
        ("quantize_config.json", "GPTQ"),
        ("quant_config.json", "AWQ"),
        ("hf_quant_config.json", "NVIDIA ModelOpt"),
        ("quantization_config.json", "torchao"),
    ],
)
def test_other_programs_files_are_refused(tmp_path: Path, file: str, method: str) -> None:
    assert read_scheme(tmp_path, {}) is None
    (tmp_path / file).write_text("{}")
    assert f"({method})" in refusal(tmp_path, {})
