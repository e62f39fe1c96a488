"""A CPU's products: oneDNN's against torch's, 16-bit weights against the same ones widened, and the choice at load."""

from __future__ import annotations

import logging
from itertools import cycle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reranker import Scorer
from reranker.engine import linear as linears
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.footprint import weight_bytes
from reranker.engine.linear import BLOCK_ROWS, CpuLinear, WideningLinear, choose_product, row_blocks
from reranker.engine.precision import WIDENED
from tests.conftest import DEMO, make_model
from tests.engine.checkpoints import tensors

ROWS = (1, 2, 15, 16, 17, 100, BLOCK_ROWS, BLOCK_ROWS + 255, BLOCK_ROWS + 256, 3 * BLOCK_ROWS + 7)


def projection(inputs: int, outputs: int, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(inputs)
    return nn.Linear(inputs, outputs, bias=bias).to(dtype).requires_grad_(False)


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The models of these tests are small."""
    monkeypatch.setattr(linears, "MIN_WEIGHTS", 0)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The seconds of torch's product and of oneDNN's, in place of measured ones."""
    seconds = cycle([request.param[0]] * 2 + [request.param[1]] * 2)
    monkeypatch.setattr(linears, "_thread_seconds", lambda work: next(seconds))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 160), (130, 100)])
@torch.inference_mode()
def test_packed_products_are_torchs_but_for_rounding(inputs: int, outputs: int, bias: bool) -> None:
    exact = projection(inputs, outputs, bias)
    layer = CpuLinear(exact)
    layer.pack()
    assert layer.weight is None, "the weights are held once"
    x = torch.randn(max(ROWS), inputs)
    whole = layer(x)
    for rows in ROWS:
        expected = F.linear(x[:rows], exact.weight, exact.bias)
        torch.testing.assert_close(layer(x[:rows]), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(layer(x[:rows]), whole[:rows]), "a row does not depend on the others"


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 160), (130, 100), (512, 1100)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_widened_products_are_those_of_float32_to_the_last_bit(
    inputs: int, outputs: int, bias: bool, packed: bool, dtype: torch.dtype
) -> None:
    stored = projection(inputs, outputs, bias, dtype)
    wide, layer = CpuLinear(projection(inputs, outputs, bias, dtype).float()), WideningLinear(stored)
    if packed:
        wide.pack()
        layer.pack()
    assert layer.weight.dtype is dtype
    x = torch.randn(max(ROWS), inputs)
    for rows in ROWS:
        assert torch.equal(layer(x[:rows]), wide(x[:rows]))


def test_a_small_model_is_not_timed(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Workers that choose by noise would give scores with different last digits."""
    monkeypatch.undo()
    linear = CpuLinear(projection(96, 160, bias=False))
    with caplog.at_level(logging.INFO):
        choose_product([linear])
    assert linear.packed is None
    assert "products: torch's own (the model is small)" in caplog.messages


@pytest.mark.parametrize("timed", [(1.0, 0.9), (1.0, 1.0)], indirect=True)
def test_the_faster_product_is_used_for_all(
    timed: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wide, half = CpuLinear(projection(96, 160, bias=False)), WideningLinear(projection(96, 64, True, torch.bfloat16))
    with caplog.at_level(logging.INFO):
        choose_product([wide, half])
    used = wide.packed is not None
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == [
        "products: oneDNN's" if used else "products: torch's own"
    ]
    assert (half.product is not F.linear) is used
    assert ("1.11 times" in caplog.text) is used


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'"), "no attribute"),
        (RuntimeError("mkldnn is not built\nand more"), "mkldnn is not built"),
        (None, "its products differ by 1e+00 of their norm"),
    ],
)
def test_an_operator_that_is_missing_or_wrong_is_not_used(
    model_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception | None,
    reason: str,
) -> None:
    def fail(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if error is not None:
            raise error
        return x.new_zeros(len(x), weight.shape[0])

    monkeypatch.setattr(linears, "_onednn", fail)
    with caplog.at_level(logging.INFO):
        scorer = Scorer.load(model_path, device="cpu", precision="float32")
    assert len(scorer.rerank("a", ["b"])) == 1
    [message] = [message for message in caplog.messages if message.startswith("products: ")]
    assert message.startswith("products: torch's own (oneDNN: ")
    assert reason in message
    assert "\n" not in message


@pytest.mark.parametrize("timed", [(1.0, 0.5), (0.5, 1.0)], indirect=True)
def test_scores_of_16_bit_weights_are_those_of_float32_to_the_last_bit(timed: None) -> None:
    precisions = ("float32", "float32-w16")  # in equal passes: a measured budget differs between two loads
    exact, half = (Scorer.load(DEMO, device="cpu", precision=name, max_batch_tokens=4096) for name in precisions)
    assert half.info.precision == "float32-w16"
    for documents in (["gzip"], ["gzip compresses files", "chess is a game", "tar " * 300] * 7):
        assert half.rerank("how to compress files", documents) == exact.rerank("how to compress files", documents)


def test_weights_that_are_not_all_in_16_bits_are_not_rounded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = make_model(tmp_path / "m", layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors(path, lambda found: {key: t if key == name else t.bfloat16() for key, t in found.items()})
    assert Weights(path).half is None
    scorer = Scorer.load(path, device="cpu", precision="float32-w16")
    assert scorer.info.precision != "float32-w16"
    assert "float32-w16 is for weights that are all stored in bfloat16" in caplog.text


def test_the_memory_of_16_bit_weights_is_half(tmp_path: Path) -> None:
    path = make_model(tmp_path / "m", layers=2)
    tensors(path, lambda found: {name: tensor.bfloat16() for name, tensor in found.items()})
    weights = Weights(path)
    assert weights.half is torch.bfloat16
    norms = sum(2 * stored.numel for stored in weights.stored.values() if len(stored.shape) == 1)
    stored = sum(stored.numel * stored.itemsize for stored in weights.stored.values())
    held, loading = weight_bytes(weights, WIDENED, torch.float32)
    assert (held, loading) == (stored + norms, 0)
    wide, packing = weight_bytes(weights, torch.float32, torch.float32)
    projections = sum(s.numel for name, s in weights.stored.items() if name.endswith("_proj.weight"))
    assert wide == held + 2 * projections
    assert packing == 4 * 2 * weights.stored["model.layers.0.mlp.up_proj.weight"].numel


@pytest.mark.parametrize("rows", [0, *ROWS])
def test_blocks_are_all_rows_in_order_and_none_is_small(rows: int) -> None:
    x = torch.arange(rows)
    blocks = [block for (block,) in row_blocks(x)]
    assert torch.equal(torch.cat(blocks), x)
    assert all(len(block) == BLOCK_ROWS for block in blocks[:-1])
    assert len(blocks) == 1 or BLOCK_ROWS / 2 <= len(blocks[-1]) < 1.5 * BLOCK_ROWS
