from __future__ import annotations

import pytest
import torch

from reranker.engine.precision import choose_precisions, short

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AMX, NO_AMX = True, False


@pytest.mark.parametrize(
    ("wanted", "device", "hardware", "expected", "reason"),
    [
        ("auto", CPU, NO_AMX, ["float32"], "no AMX"),
        ("auto", CPU, AMX, ["bfloat16", "float32"], "(AMX)"),
        ("auto", CUDA, (9, 0), ["bfloat16", "float32"], "the GPU has bfloat16"),
        ("auto", CUDA, (7, 5), ["float16", "float32"], "the GPU has no bfloat16"),
        ("bf16", CUDA, (9, 0), ["bfloat16", "float32"], "requested"),
        ("bf16", CUDA, (7, 5), ["float16", "float32"], "bf16 needs compute capability 8.0 (Ampere); auto: the GPU"),
        ("fp16", CUDA, (9, 0), ["float16", "float32"], "requested"),
        ("fp16", CPU, NO_AMX, ["float16", "float32"], "requested"),
        ("bfloat16", CPU, NO_AMX, ["bfloat16", "float32"], "requested"),
        ("fp32", CPU, AMX, ["float32"], "requested"),
        ("int8", CPU, NO_AMX, ["int8", "float32"], "requested"),
        ("int8", CPU, AMX, ["int8", "bfloat16", "float32"], "requested"),
        ("int8", CUDA, (8, 0), ["bfloat16", "float32"], "int8 is for the CPU only; auto: the GPU has bfloat16"),
        ("fp8", CUDA, (9, 0), ["float8", "bfloat16", "float32"], "requested"),
        ("float8", CUDA, (8, 0), ["bfloat16", "float32"], "float8 needs compute capability 8.9 (Ada, Hopper); auto"),
        ("float8", CPU, NO_AMX, ["float32"], "float8 is for NVIDIA GPUs only; auto"),
        ("fp8", CPU, AMX, ["bfloat16", "float32"], "fp8 is for NVIDIA GPUs only; auto"),
    ],
)
def test_precisions_by_setting_and_hardware(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    device: torch.device,
    hardware: bool | tuple[int, int],
    expected: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hardware)
    choices = choose_precisions(wanted, device)
    assert [short(choice.value) for choice in choices] == expected
    assert reason in choices[0].reason
    assert [choice.reason for choice in choices[1:]] == [f"{name} failed" for name in expected[:-1]]
