from __future__ import annotations

import pytest
import torch

from reranker.engine.precision import FLOAT8, choose_precisions, short

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AMX, NO_AMX, VNNI = True, False, True


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


@pytest.mark.parametrize(
    ("wanted", "device", "hardware", "stored", "expected", "reason"),
    [
        ("auto", CUDA, (9, 0), FLOAT8, ["float8", "bfloat16", "float32"], "auto: the weights are stored so"),
        (
            "auto",
            CUDA,
            (8, 0),
            FLOAT8,
            ["bfloat16", "float32"],
            "has bfloat16; float8, as the weights are stored, needs",
        ),
        ("auto", CUDA, (9, 0), torch.int8, ["bfloat16", "float32"], "int8, as the weights are stored, is for the CPU"),
        ("auto", CPU, VNNI, torch.int8, ["int8", "float32"], "auto: the weights are stored so"),
        ("auto", CPU, not VNNI, torch.int8, ["float32"], "(no AMX); int8, as the weights are stored, has 7-bit"),
        ("auto", CPU, VNNI, FLOAT8, ["float32"], "float8, as the weights are stored, is for NVIDIA GPUs only"),
        ("int8", CPU, not VNNI, torch.int8, ["int8", "float32"], "requested"),
        ("int8", CPU, VNNI, FLOAT8, ["int8", "float32"], "requested"),
        ("float8", CUDA, (9, 0), torch.int8, ["float8", "bfloat16", "float32"], "requested"),
        ("fp32", CPU, VNNI, torch.int8, ["float32"], "requested"),
    ],
)
def test_weights_that_are_stored_in_8_bits_are_taken_so_where_that_is_fast(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    device: torch.device,
    hardware: bool | tuple[int, int],
    stored: torch.dtype,
    expected: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: hardware)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: hardware)
    choices = choose_precisions(wanted, device, stored)
    assert [short(choice.value) for choice in choices] == expected
    assert reason in choices[0].reason
