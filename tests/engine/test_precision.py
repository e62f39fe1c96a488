from __future__ import annotations

import pytest
import torch

from reranker.engine.precision import FLOAT8, between, choose_precisions, computable, short

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
AMX, NO_AMX, VNNI = True, False, True


@pytest.fixture(autouse=True)
def _without_avx512_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)


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
        ("int8", CUDA, (8, 0), ["int8", "bfloat16", "float32"], "requested"),
        ("int8", CUDA, (7, 5), ["int8", "float16", "float32"], "requested"),
        ("int8", CUDA, (7, 0), ["float16", "float32"], "int8 needs compute capability 7.5 (Turing); auto: the GPU has"),
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
        ("auto", CUDA, (9, 0), torch.int8, ["int8", "bfloat16", "float32"], "auto: the weights are stored so"),
        ("auto", CUDA, (7, 5), torch.int8, ["int8", "float16", "float32"], "auto: the weights are stored so"),
        ("auto", CUDA, (7, 0), torch.int8, ["float16", "float32"], "int8, as the weights are stored, needs compute"),
        ("auto", CPU, VNNI, torch.int8, ["int8", "float32"], "auto: the weights are stored so"),
        ("auto", CPU, not VNNI, torch.int8, ["float32"], "AVX512_BF16); int8, as the weights are stored, has 7-bit"),
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


@pytest.mark.parametrize(
    ("wanted", "capability", "fitting", "expected", "reason"),
    [
        ("auto", (9, 0), {torch.bfloat16, FLOAT8, torch.int8}, ["bfloat16", "float32"], "the GPU has bfloat16"),
        (
            "auto",
            (9, 0),
            {FLOAT8, torch.int8},
            ["float8", "int8", "bfloat16", "float32"],
            "auto: the model does not fit into the memory in bfloat16, but in float8",
        ),
        (
            "auto",
            (8, 6),
            {FLOAT8, torch.int8},
            ["int8", "bfloat16", "float32"],
            "auto: the model does not fit into the memory in bfloat16, but in int8",
        ),
        (
            "auto",
            (7, 5),
            {torch.int8},
            ["int8", "float16", "float32"],
            "not fit into the memory in float16, but in int8",
        ),
        ("auto", (7, 0), {torch.int8}, ["float16", "float32"], "the GPU has no bfloat16"),
        ("auto", (9, 0), set(), ["bfloat16", "float32"], "the GPU has bfloat16"),
        ("bf16", (9, 0), {FLOAT8, torch.int8}, ["bfloat16", "float32"], "requested"),
        (
            "fp8",
            (8, 0),
            {torch.int8},
            ["int8", "bfloat16", "float32"],
            "fp8 needs compute capability 8.9 (Ada, Hopper); a",
        ),
        ("fp8", (9, 0), {FLOAT8, torch.int8}, ["float8", "int8", "bfloat16", "float32"], "requested"),
    ],
)
def test_8_bits_are_taken_where_16_do_not_fit_into_the_memory_of_a_gpu(
    monkeypatch: pytest.MonkeyPatch,
    wanted: str,
    capability: tuple[int, int],
    fitting: set[torch.dtype],
    expected: list[str],
    reason: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    choices = choose_precisions(wanted, CUDA, fits=fitting.__contains__)
    assert [short(choice.value) for choice in choices] == expected
    assert reason in choices[0].reason


@pytest.mark.parametrize("stored", [None, torch.bfloat16, torch.float16, FLOAT8])
@pytest.mark.parametrize(("amx", "avx"), [(True, True), (False, True), (False, False)])
def test_on_a_cpu_with_little_memory_16_bit_weights_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch, amx: bool, avx: bool, stored: torch.dtype | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    roomy = choose_precisions("auto", CPU, stored, lambda dtype: True)[0]
    tight = choose_precisions("auto", CPU, stored, lambda dtype: False)[0]
    assert short(roomy.value) == ("bfloat16" if amx else "float32")
    assert ("MODEL_PRECISION=bfloat16 is faster" in roomy.reason) is (avx and not amx)
    widened = stored in (torch.bfloat16, torch.float16) and not amx
    assert short(tight.value) == ("float32-w16" if widened else short(roomy.value))
    assert ("the weights stay in 16 bits" in tight.reason) is widened


@pytest.mark.parametrize(
    ("device", "stored", "expected", "reason"),
    [
        (CPU, torch.bfloat16, ["float32-w16", "float32"], "requested"),
        (CPU, torch.float16, ["float32-w16", "float32"], "requested"),
        (CPU, None, ["float32"], "float32-w16 is for weights that are all stored in bfloat16, or all in float16; auto"),
        (CPU, torch.int8, ["float32"], "float32-w16 is for weights that"),
        (CUDA, torch.bfloat16, ["bfloat16", "float32"], "float32-w16 is for CPUs only; auto: the GPU has bfloat16"),
    ],
)
def test_widened_weights_need_a_cpu_and_16_bits(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, stored: torch.dtype, expected: list[str], reason: str
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    choices = choose_precisions("float32-w16", device, stored)
    assert [short(choice.value) for choice in choices] == expected
    assert reason in choices[0].reason


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        (CPU, None, {torch.int8: torch.float32, torch.bfloat16: torch.bfloat16, torch.float32: torch.float32}),
        (CUDA, (7, 5), {torch.int8: torch.float16, torch.float16: torch.float16, torch.float32: torch.float32}),
        (CUDA, (8, 0), {torch.int8: torch.bfloat16, torch.bfloat16: torch.bfloat16, torch.float32: torch.float32}),
        (
            CUDA,
            (9, 0),
            {
                torch.int8: torch.bfloat16,
                FLOAT8: torch.bfloat16,
                torch.bfloat16: torch.bfloat16,
                torch.float32: torch.float32,
            },
        ),
    ],
)
def test_what_a_device_computes_and_what_is_between_the_products(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    capability: tuple[int, int] | None,
    expected: dict[torch.dtype, torch.dtype],
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert {dtype: between(dtype, device) for dtype in computable(device)} == expected
