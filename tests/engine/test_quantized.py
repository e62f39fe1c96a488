from __future__ import annotations

import itertools
import json
import logging
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.card import Card
from reranker import Scorer
from reranker.engine import model, precision, quantized
from reranker.engine.acceleration import differs, sample
from reranker.engine.budget import MIN_BATCH_TOKENS
from reranker.engine.checkpoint.locate import Located
from reranker.engine.checkpoint.scales import Rounded
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.families import open_checkpoint
from reranker.engine.families.base import LayerFns
from reranker.engine.families.official import OFFICIAL
from reranker.engine.footprint import footprint
from reranker.engine.quantized import Float8Linear, Int8GpuLinear, Int8Linear, difference, quantize
from tests.conftest import DEMO, ROOT, make_model
from tests.engine.test_decoder import Live
from tests.engine.test_scorer import expected, packed, requests, worst

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(5)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(512, 1024), (96, 160)])
def test_products_are_near_those_of_the_weights(inputs: int, outputs: int, bias: bool) -> None:
    exact = linear(inputs, outputs, bias)
    assert 0.001 < difference(Int8Linear(exact), exact) < 0.03
    exact = exact.bfloat16()
    assert 0.001 < difference(Int8GpuLinear(exact), exact) < 0.03
    assert 0.001 < difference(Float8Linear(exact), exact) < 0.05


def stored_weights(dtype: torch.dtype, scale: Tensor) -> tuple[Rounded, nn.Linear]:
    """All 8-bit values that a checkpoint may hold, with their scales, and their products in float32."""
    bits = torch.randint(-128, 128, (len(scale), 512), generator=torch.Generator().manual_seed(5)).to(torch.int8)
    if dtype is precision.FLOAT8:
        bits[(bits == 127) | (bits == -1)] = 0  # 0x7F and 0xFF are NaN
    values, exact = bits.view(dtype), nn.Linear(512, len(scale))
    exact.weight.data = values.float() * scale[:, None]
    return Rounded(values, scale), exact


SCALES = [torch.rand(96).add(0.01).div(100), torch.full((96,), 0.003), torch.logspace(-6, 2, 96)]


@pytest.mark.parametrize("scale", SCALES)
def test_stored_int8_weights_are_multiplied_bit_by_bit(scale: Tensor) -> None:
    stored, exact = stored_weights(torch.int8, scale)
    layer = quantize(exact, torch.int8, stored)
    assert isinstance(layer, Int8Linear)
    weight, bias = torch.ops.quantized.linear_unpack(layer.packed)
    assert torch.equal(weight.int_repr(), stored.values)
    assert torch.equal(weight.q_per_channel_scales().float(), scale)
    assert bias is None
    assert 0.001 < difference(layer, exact) < 0.03
    x = torch.randint(-60, 61, (7, 512)).float()
    x[:, 0] = layer.levels  # every token's maximum: the activations are integers, and exact
    products = (x.double() @ stored.values.double().T) * scale.double() + exact.bias.double()
    torch.testing.assert_close(layer(x).double(), products, rtol=1e-5, atol=1e-5 * products.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", SCALES)
def test_the_gpus_int8_layer_multiplies_stored_weights_exactly(
    monkeypatch: pytest.MonkeyPatch, scale: Tensor, dtype: torch.dtype
) -> None:
    stored, exact = stored_weights(torch.int8, scale.clamp_max(1))
    monkeypatch.setattr(quantized, "Int8Linear", Int8GpuLinear)  # a GPU's layer on the CPU, which has `_int_mm` too
    layer = quantize(exact, torch.int8, stored)
    assert isinstance(layer, Int8GpuLinear)
    assert layer.weight is stored.values
    x = torch.randint(-127, 128, (40, 512), generator=torch.Generator().manual_seed(6)).to(dtype)
    x[:, 0] = 127  # every token's maximum: the activations are integers, and exact
    products = (x.long() @ stored.values.long().T).float() * stored.scale + exact.bias
    for rows in (1, 2, 16, 17, 31, 40):
        got = layer(x[:rows])
        assert got.dtype is dtype
        assert torch.equal(got, products[:rows].to(dtype))


def as_cuda_multiplies(a: Tensor, b: Tensor) -> Tensor:
    """`torch._int_mm` with what CUDA asks of its arguments (torch 2.11 to 2.13); the meta device does not ask it."""
    assert a.dtype is b.dtype is torch.int8
    assert a.shape[0] > 16, f"self.size(0) needs to be greater than 16, but got {a.shape[0]}"
    for size in (a.shape[1], b.shape[1]):
        assert size > 0
        assert size % 8 == 0, f"needs to be greater than 0 and a multiple of 8, but got {size}"
    assert a.is_contiguous()
    assert b.t().is_contiguous(), "both matrices have the inputs in a row: cuBLAS's fast layout"
    return INT_MM(a, b)  # type: ignore[no-any-return]


INT_MM: Any = torch._int_mm


@pytest.mark.parametrize("name", OFFICIAL)
def test_cuda_takes_the_shapes_of_the_official_models(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    hidden, intermediate, _, heads, groups, _ = OFFICIAL[name]
    monkeypatch.setattr(torch, "_int_mm", as_cuda_multiplies)
    inner = 128 * heads
    shapes = [(hidden, inner + 256 * groups), (inner, hidden), (hidden, 2 * intermediate), (intermediate, hidden)]
    for inputs, outputs in shapes:
        for dtype in (torch.bfloat16, torch.float16):
            layer = Int8GpuLinear(nn.Linear(inputs, outputs, bias=False, device="meta", dtype=dtype))
            for rows in (1, 16, 17, 1001, 262_144):
                out = layer(torch.empty(rows, inputs, device="meta", dtype=dtype))
                assert (out.shape, out.dtype) == ((rows, outputs), dtype)


def test_no_product_has_fewer_rows_than_the_one_that_is_proved_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def multiply(a: Tensor, b: Tensor) -> Tensor:
        seen.append(len(a))
        return INT_MM(a, b)  # type: ignore[no-any-return]

    monkeypatch.setattr(torch, "_int_mm", multiply)
    exact = linear(128, 64).bfloat16()
    layer = Int8GpuLinear(exact)
    difference(layer, exact)
    for rows in (1, 17, 31, 32, 33):
        assert len(layer(torch.ones(rows, 128, dtype=torch.bfloat16))) == rows
    assert seen == [32, 32, 32, 32, 32, 33]


def test_a_width_that_cuda_does_not_take_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "_int_mm", as_cuda_multiplies)
    with pytest.raises(AssertionError, match="multiple of 8"):
        Int8GpuLinear(linear(100, 64).bfloat16())(torch.zeros(20, 100, dtype=torch.bfloat16))


@pytest.mark.parametrize("scale", SCALES)
def test_stored_float8_weights_are_multiplied_bit_by_bit(scale: Tensor) -> None:
    stored, exact = stored_weights(precision.FLOAT8, scale)
    layer = quantize(exact, precision.FLOAT8, stored)
    assert isinstance(layer, Float8Linear)
    assert torch.equal(layer.weight.view(torch.uint8), stored.values.view(torch.uint8))
    assert torch.equal(layer.scale, scale[None])
    assert 0.001 < difference(layer, exact) < 0.05


@pytest.mark.parametrize("dtype", [torch.int8, precision.FLOAT8])
def test_stored_weights_with_other_scales_than_their_products_are_refused(dtype: torch.dtype) -> None:
    stored, exact = stored_weights(dtype, torch.full((96,), 0.003))
    with pytest.raises(RuntimeError, match="off by"):
        quantize(exact, dtype, stored._replace(scale=1.2 * stored.scale))


@pytest.mark.parametrize("kind", [Int8Linear, Int8GpuLinear, Float8Linear])
def test_a_tokens_product_does_not_depend_on_its_neighbours(kind: type[nn.Module]) -> None:
    layer = kind(linear(128, 64).to(torch.float32 if kind is Int8Linear else torch.bfloat16))
    x = torch.randn(5, 128).to(torch.float32 if kind is Int8Linear else torch.bfloat16)
    large = torch.cat([x, 1000 * x])
    torch.testing.assert_close(layer(large)[:5], layer(x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", [Int8Linear, Int8GpuLinear])
def test_a_zero_token_gives_zero(kind: type[nn.Module]) -> None:
    assert torch.equal(kind(linear(64, 32))(torch.zeros(3, 64)), torch.zeros(3, 32))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_token_that_is_not_finite_stays_so(wrong: float) -> None:
    """float16 may overflow between the products, and the warm-up must see it."""
    x = torch.ones(2, 64, dtype=torch.float16)
    x[0, 3] = wrong
    finite = Int8GpuLinear(linear(64, 32).half())(x).isfinite()
    assert not finite[0].any()
    assert finite[1].all()


def test_a_product_that_overflows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "difference", lambda quantized, linear: 0.5)
    with pytest.raises(RuntimeError, match="off by 50%"):
        quantize(linear(64, 64), torch.int8)


@pytest.mark.skipif(torch.cpu._is_vnni_supported(), reason="this processor does not overflow")
def test_the_proof_finds_the_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit activations on a processor that adds pairs of products in 16 bits."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    with pytest.raises(RuntimeError, match="off by"):
        quantize(linear(512, 64), torch.int8)


@pytest.mark.parametrize("kind", [Int8Linear, Int8GpuLinear])
def test_int8_stays_near_the_card_and_does_not_depend_on_neighbours(
    model_path: Path, card: Card, kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights of this spread give logits of about 4; the tolerance is the effect of rounding on them."""
    monkeypatch.setattr(quantized, "Int8Linear", kind)
    scorer = Scorer.load(model_path, device="cpu", precision="int8")
    assert scorer.info.precision == "int8"
    rng = random.Random(16)
    group = requests(rng, 4)
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 0.6
    alone = packed(scorer, [group[2]])[0]
    together = packed(scorer, group)[2]
    assert worst([together], [alone]) < 1e-4
    order = sorted(range(len(alone)), key=lambda i: -alone[i])
    for better, worse in itertools.pairwise(order):
        assert together[better] > together[worse] - 1e-4


def test_float8_arithmetic_stays_near_the_card(model_path: Path, card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same layers on the CPU, whose `_scaled_mm` is slow and correct."""
    monkeypatch.setattr(precision, "_unsupported", lambda dtype, device: "")
    scorer = Scorer.load(model_path, device="cpu", precision="fp8")
    assert scorer.info.precision == "float8"
    group = requests(random.Random(16), 3)
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 2.0
    assert worst([packed(scorer, group)[1]], packed(scorer, [group[1]])) < 1e-3


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_float8_is_proved_as_it_is_used_however_the_weights_are_stored(
    monkeypatch: pytest.MonkeyPatch, stored: torch.dtype
) -> None:
    """A GPU's product with a scale per row supports bfloat16 results only."""
    scaled: Any = torch._scaled_mm

    def only_bfloat16(*args: Any, out_dtype: torch.dtype, **options: Any) -> Any:
        if out_dtype is not torch.bfloat16:
            raise ValueError("Only bf16 high precision output types are supported for row-wise scaling.")
        return scaled(*args, out_dtype=out_dtype, **options)

    monkeypatch.setattr(torch, "_scaled_mm", only_bfloat16)
    layer = quantize(linear(128, 64, bias=True).to(stored), precision.FLOAT8)
    assert layer(torch.randn(3, 128).bfloat16()).dtype is torch.bfloat16


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, NotImplementedError, AttributeError])
def test_whatever_a_kernel_says_float8_falls_back(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    def none(*args: object, **options: object) -> None:
        raise kind("not on this device")

    monkeypatch.setattr(precision, "_unsupported", lambda dtype, device: "")
    monkeypatch.setattr(torch, "_scaled_mm", none)
    assert Scorer.load(model_path, device="cpu", precision="float8").info.precision == "float32"


@pytest.mark.parametrize("kind", [Float8Linear, Int8GpuLinear])
def test_the_gpus_layers_can_be_compiled(kind: type[nn.Module]) -> None:
    """Traced as one graph for any number of tokens, also for few, which int8 pads; only a GPU has the kernels."""
    torch._dynamo.reset()
    layer = kind(linear(128, 64).bfloat16())
    traced = torch.compile(layer, backend="aot_eager", dynamic=True, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True), torch.inference_mode():
        for tokens in (25, 9, 2, 40):
            x = torch.randn(tokens, 128).bfloat16()
            torch.testing.assert_close(traced(x), layer(x))


def test_the_stages_of_a_layer_with_int8_are_one_graph_each(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "Int8Linear", Int8GpuLinear)
    scorer = Scorer.load(model_path, device="cpu", precision="int8")
    assert scorer.info.precision == "int8"
    torch._dynamo.reset()
    compiled = partial(torch.compile, backend="eager", dynamic=True, fullgraph=True)
    traced = LayerFns(*map(compiled, scorer.model.backbone.eager))
    for tokens in (300, 700):
        batch = sample(tokens, scorer.model)
        with torch._dynamo.config.patch(error_on_recompile=True):
            fast = scorer.model.hidden(batch, traced)
        # The last bit of a sum may change an 8-bit rounding.
        assert not differs(lambda: fast, lambda: scorer.model.hidden(batch), tolerance=0.02)  # noqa: B023


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float8", "int8"])
def test_a_pass_takes_no_more_memory_than_is_planned_for_it(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the widths of 4B, a sixteenth of each; all rows at once, as on a GPU, but without its compiled layers."""
    monkeypatch.setattr("reranker.engine.linear.BLOCK_ROWS", 1 << 20)
    monkeypatch.setattr("reranker.engine.model.choose_product", lambda linears: None)  # oneDNN's layout has no storage
    monkeypatch.setattr(precision, "_unsupported", lambda dtype, device: "")
    monkeypatch.setattr(quantized, "Int8Linear", Int8GpuLinear)
    if name == "int8":
        monkeypatch.setattr("reranker.engine.model.between", lambda dtype, device: torch.bfloat16)
    widths: dict[str, Any] = {
        "hidden_size": 160,
        "intermediate_size": 608,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    path = make_model(tmp_path / "m", layers=2, head_dim=32, **widths)
    scorer = Scorer.load(path, device="cpu", precision=name)
    assert scorer.info.precision == name
    batch = sample(MIN_BATCH_TOKENS, scorer.model)
    with Live() as live:
        scorer.model.hidden(batch)
    family, dtype = open_checkpoint(Located(path)), scorer.model.dtype
    planned = footprint(Weights(path), family.widths, dtype, torch.float32 if name == "float32" else torch.bfloat16, 0)
    assert 0.6 * planned.batch < live.peak < planned.batch


def test_the_demo_ranks_as_well_in_int8() -> None:
    part = json.loads((ROOT / "demo" / "heldout.json").read_text(encoding="utf-8"))["en"]
    means = []
    for name in ("float32", "int8"):
        scorer = Scorer.load(DEMO, device="cpu", precision=name)
        ranks = []
        for task in part["tasks"][:12]:
            scores = scorer.rerank(task["query"], [part["documents"][i] for i in task["documents"]])
            ranks.append(1 + sum(score > scores[task["answer"]] for score in scores))
        means.append(sum(1 / rank for rank in ranks) / len(ranks))
    assert means[1] == pytest.approx(means[0], abs=0.05)  # 12 tasks; benchmarks/int8.py measures all of them


def test_a_machine_without_the_kernel_falls_back(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(linear: nn.Linear, precision: torch.dtype) -> nn.Module:
        raise RuntimeError("Didn't find engine for operation quantized::linear_prepack\nand more")

    monkeypatch.setattr(model, "quantize", none)
    with caplog.at_level(logging.INFO):
        assert Scorer.load(model_path, device="cpu", precision="int8").info.precision == "float32"
    assert "precision int8 cannot be used: Didn't find engine" in caplog.text
    assert "precision: float32 (int8 failed)" in caplog.text


def test_a_processor_without_vnni_is_told(
    model_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    Scorer.load(model_path, device="cpu", precision="int8")
    assert [m for m in caplog.messages if "no VNNI" in m]


@pytest.mark.cuda
@CUDA
def test_float8_on_the_gpu_equals_its_plain_arithmetic(model_path: Path, card: Card) -> None:
    scorer = Scorer.load(model_path, device="cuda", precision="float8")
    if scorer.info.precision != "float8":
        pytest.skip("this GPU has no float8 products")
    group = requests(random.Random(16), 3)
    assert worst(packed(scorer, group), [expected(card, r) for r in group]) < 2.0
    assert worst([packed(scorer, group)[1]], packed(scorer, [group[1]])) < 0.6
