"""Quantised weights are values times scales: in the files, after loading, and in the scores.

The files have the form that compressed-tensors 0.20.1 wrote for a small model with the same settings; those of
fine-grained FP8 are written by transformers' own code.
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import Qwen3ForCausalLM

from reranker import ModelLoadError, Scorer
from reranker.engine.batch import pack
from reranker.engine.checkpoint.locate import Located, locate
from reranker.engine.checkpoint.quantization import read_scheme
from reranker.engine.checkpoint.scales import Layout, scale_per_output, widen
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.families import open_checkpoint
from reranker.engine.footprint import weight_bytes
from reranker.engine.model import Model, load
from reranker.engine.precision import FLOAT8, QUANTIZED
from reranker.engine.quantized import Float8Linear, Int8Linear
from reranker.types import EncodedRequest, Slice
from tests.engine.adapters import factors, write_adapter
from tests.engine.checkpoints import ENTRIES, Tensors, small_model, tensors
from tests.engine.quantization import FORMS, Form, compressed_tensors, fine_grained, group, plain_twin, quantize
from tests.engine.test_decoder import Live

CPU = torch.device("cpu")
UP = "model.layers.0.mlp.up_proj.weight"
BY_NAME = {form.name: form for form in FORMS}
INT8, FP8 = FORMS[0], FORMS[1]
PER_OUTPUT = {"W8A8", "FP8 dynamic", "FP8 static", "FP8 of vLLM", "a rounded cache"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("models") / "base", layers=2, tied=False)


@pytest.fixture(scope="module")
def int8(base: Path) -> Path:
    return quantize(base, base.with_name("int8"), INT8)


def layout(path: Path) -> Layout:
    scheme = read_scheme(path, json.loads((path / "config.json").read_text()))
    assert scheme is not None
    return scheme.layout(path, Weights(path).stored)


@pytest.fixture(scope="module")
def float8(base: Path) -> Path:
    return quantize(base, base.with_name("float8"), FP8)


def loaded(path: Path, precision: torch.dtype = torch.float32) -> Model:
    return load(open_checkpoint(Located(path)), CPU, precision, 90)


def logits(model: Model, prompts: list[list[int]]) -> list[float]:
    """All prompts in one packed batch, cut into a prefix and a document."""
    batch = pack([Slice(EncodedRequest(ids[:7], [ids[7:]]), 0, 1) for ids in prompts])
    return model.forward(batch).tolist()


@torch.inference_mode()
def expected(path: Path, prompts: list[list[int]]) -> list[float]:
    """The same of transformers' model with the weights of the plain twin, one prompt at a time."""
    model: Any = Qwen3ForCausalLM.from_pretrained(str(plain_twin(path)), dtype=torch.float32)
    tokenizer: Any = open_checkpoint(Located(path)).checkpoint.tokenizer
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    last = [model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in prompts]
    return [float(row[yes] - row[no]) for row in last]


def prompts(rng: random.Random) -> list[list[int]]:
    return [[rng.randrange(ENTRIES) for _ in range(length)] for length in (8, 9, 30, 71, rng.randrange(10, 200))]


def worst(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


def check_weights(path: Path) -> Layout:
    """Every weight is that of the plain twin, bit by bit, and every scale belongs to one of them."""
    found, stored, plain = (
        layout(path),
        load_file(path / "model.safetensors"),
        load_file(plain_twin(path) / "model.safetensors"),
    )
    for name, parts in found.weights.items():
        zero_point = stored[parts.zero_point] if parts.zero_point else None
        assert torch.equal(widen(stored[name], stored[parts.scale], zero_point, parts.block), plain[name])
    used = [name for parts in found.weights.values() for name in parts[:3] if name] + found.unused
    assert len(used) == len(set(used))
    assert sorted(used + [name for name in plain if name not in found.weights]) == sorted(stored)
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_weights_are_values_times_scales(base: Path, tmp_path: Path, form: Form) -> None:
    path = quantize(base, tmp_path / "m", form)
    found, stored = check_weights(path), load_file(path / "model.safetensors")
    assert len(found.unused) == len(found.weights) * len(form.others) + 2 * len(form.cached)
    for name, parts in found.weights.items():
        zero_point = stored[parts.zero_point] if parts.zero_point else None
        scale = scale_per_output(stored[name], stored[parts.scale], zero_point, parts.block)
        if scale is None:
            assert form.name not in PER_OUTPUT
        else:
            whole = load_file(plain_twin(path) / "model.safetensors")[name]
            assert torch.equal(stored[name].float() * scale[:, None], whole)


@pytest.mark.parametrize("scales", ["float", "ue8m0"])
def test_weights_are_those_of_transformers(base: Path, tmp_path: Path, scales: str) -> None:
    found = check_weights(fine_grained(base, tmp_path / "m", scale_fmt=scales))
    assert 0 < len(found.weights) < 14  # no block of 16 rows divides the others


def test_a_zero_point_of_zero_is_no_zero_point() -> None:
    """Older versions of compressed-tensors store it for symmetric weights too."""
    values, scale = torch.tensor([[1, -2], [3, 4]], dtype=torch.int8), torch.tensor([[0.5], [2.0]])
    zero = torch.zeros(2, 1, dtype=torch.int8)
    assert torch.equal(widen(values, scale, zero, (1, 2)), torch.tensor([[0.5, -1], [6, 8]]))
    found = scale_per_output(values, scale, zero, (1, 2))
    assert found is not None
    assert found.tolist() == [0.5, 2.0]
    assert scale_per_output(values, scale, zero + 1, (1, 2)) is None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_scores_are_those_of_the_widened_weights(base: Path, tmp_path: Path, form: Form) -> None:
    path, given = quantize(base, tmp_path / "m", form), prompts(random.Random(form.name))
    assert worst(logits(loaded(path), given), expected(path, given)) < 1e-5


@pytest.mark.parametrize("seed", range(6))
def test_scores_of_random_shapes_and_mixes_are_those_of_the_widened_weights(tmp_path: Path, seed: int) -> None:
    """Weights of a layer are int8, float8 or neither at random, in blocks of any size, with and without biases."""
    rng = random.Random(seed)
    shape: dict[str, Any] = {"hidden_size": 32 * rng.randint(1, 2), "intermediate_size": 8 * rng.randint(3, 9)}
    bias, tied = rng.random() < 0.5, rng.random() < 0.5
    base = small_model(tmp_path / "base", layers=2, attention_bias=bias, tied=tied, **shape)
    block = rng.choice([(1, 0), (0, 0), (1, 8), (8, 8), (rng.randint(2, 40), rng.randint(2, 40))])
    structure = [block[0] or 10**6, block[1] or 10**6]
    groups = (group(kind, "block", block_structure=structure) for kind in ("int", "float"))
    names = [name for name in load_file(base / "model.safetensors") if "_proj.weight" in name or "embed" in name]
    kinds = {name: rng.choice(["int", "float", "neither"]) for name in names} | {names[0]: "int"}
    form = Form(f"{seed}", compressed_tensors(*groups), {name: k for name, k in kinds.items() if k != "neither"}, block)
    path, given = quantize(base, tmp_path / "m", form), prompts(rng)
    assert worst(logits(loaded(path), given), expected(path, given)) < 1e-5


def joined(path: Path, *parts: str) -> tuple[Tensor, Tensor]:
    """The values and scales of projections in the file, one below the other."""
    stored = load_file(path / "model.safetensors")
    scales = [stored[f"{part}.weight_scale"].float().flatten() for part in parts]
    return torch.cat([stored[f"{part}.weight"] for part in parts]), torch.cat(scales)


def projections(model: Model) -> dict[tuple[str, ...], Any]:
    """Each projection of the second layer, by the names of its parts."""
    layer: Any = model.backbone.decoder.layers[1]  # type: ignore[attr-defined]
    return {
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): layer.self_attn.qkv_proj,
        ("self_attn.o_proj",): layer.self_attn.o_proj,
        ("mlp.gate_proj", "mlp.up_proj"): layer.mlp.gate_up_proj,
        ("mlp.down_proj",): layer.mlp.down_proj,
    }


def test_int8_is_multiplied_as_it_is_stored(int8: Path) -> None:
    model, given = loaded(int8, torch.int8), prompts(random.Random(4))
    for parts, projection in projections(model).items():
        values, scale = joined(int8, *(f"model.layers.1.{part}" for part in parts))
        assert isinstance(projection, Int8Linear)
        weight, _ = torch.ops.quantized.linear_unpack(projection.packed)
        assert torch.equal(weight.int_repr(), values)
        assert torch.equal(weight.q_per_channel_scales().float(), scale)
    assert 1e-4 < worst(logits(model, given), expected(int8, given)) < 0.6


@pytest.mark.parametrize("name", ["FP8 dynamic", "FP8 static"])
def test_float8_is_multiplied_as_it_is_stored(base: Path, tmp_path: Path, name: str) -> None:
    """On the CPU, whose `_scaled_mm` is slow and correct; one scale for a weight is repeated for its outputs."""
    path, given = quantize(base, tmp_path / "m", BY_NAME[name]), prompts(random.Random(4))
    model, stored = loaded(path, FLOAT8), load_file(path / "model.safetensors")
    for parts, projection in projections(model).items():
        names = [f"model.layers.1.{part}.weight" for part in parts]
        assert isinstance(projection, Float8Linear)
        values = torch.cat([stored[name] for name in names])
        assert torch.equal(projection.weight.view(torch.uint8), values.view(torch.uint8))
        scales = [stored[f"{name}_scale"].float().flatten().expand(len(stored[name])) for name in names]
        assert torch.equal(projection.scale[0], torch.cat(scales))
    assert 1e-4 < worst(logits(model, given), expected(path, given)) < 2.0


def test_one_projection_with_blocks_is_enough_to_widen_all(int8: Path) -> None:
    found = layout(int8)
    assert found.precision is torch.int8
    found.weights[UP] = found.weights[UP]._replace(per_output=False)
    assert found.precision is None


def test_a_projection_that_the_checkpoint_keeps_wide_is_not_rounded(base: Path, tmp_path: Path) -> None:
    path, given = quantize(base, tmp_path / "m", BY_NAME["a part is not rounded"]), prompts(random.Random(4))
    model, plain = loaded(path, torch.int8), load_file(plain_twin(path) / "model.safetensors")
    wide = {parts: p for parts, p in projections(model).items() if isinstance(p, torch.nn.Linear)}
    assert len(wide) == 2  # o, and q, k, v together, of which only q is rounded
    for parts, projection in wide.items():
        assert torch.equal(projection.weight, torch.cat([plain[f"model.layers.1.{part}.weight"] for part in parts]))
    assert 1e-4 < worst(logits(model, given), expected(path, given)) < 0.6


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("W8A8", FLOAT8),
        ("FP8 dynamic", torch.int8),
        ("int8 with zero points", torch.int8),
        ("FP8 in blocks", FLOAT8),
        ("FP8 attention, int8 MLP", FLOAT8),
        ("FP8 attention, int8 MLP", torch.int8),
    ],
)
def test_what_cannot_be_taken_as_it_is_stored_is_rounded_again(
    base: Path, tmp_path: Path, name: str, precision: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    path, given = quantize(base, tmp_path / "m", BY_NAME[name]), prompts(random.Random(4))
    with caplog.at_level(logging.INFO):
        model = loaded(path, precision)
    kind = Int8Linear if precision is torch.int8 else Float8Linear
    assert all(isinstance(projection, kind) for projection in projections(model).values())
    assert "widened by their scales, and rounded again to" in caplog.text
    assert 1e-4 < worst(logits(model, given), expected(path, given)) < (0.6 if precision is torch.int8 else 2.0)


@pytest.mark.parametrize(
    ("vnni", "precision", "served", "words"),
    [
        (True, "auto", "int8", "auto: the weights are stored so"),
        (False, "auto", "float32", "has 7-bit activations without VNNI, and gains little"),
        (
            True,
            "float32",
            "float32",
            "(compressed-tensors, int-quantized) are widened by their scales, and rounded to float32: 0.00",
        ),
        (True, "bfloat16", "bfloat16", "are widened by their scales, and rounded to bfloat16"),
        (True, "int8", "int8", "are taken as they are stored, in int8: 0.00 GiB"),
    ],
)
def test_the_log_says_how_quantised_weights_are_used(
    int8: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    vnni: bool,
    precision: str,
    served: str,
    words: str,
) -> None:
    if vnni and served == "int8" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    with caplog.at_level(logging.INFO):
        scorer = Scorer.load(int8, device="cpu", precision=precision)
    assert scorer.info.precision == served
    assert words in caplog.text


def test_scales_that_are_not_used_are_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = quantize(base, tmp_path / "m", BY_NAME["FP8 static"])
    with caplog.at_level(logging.INFO):
        loaded(path)
    assert "14 scales of activations and caches are not used (model.layers.0." in caplog.text
    assert "activations are not rounded" in caplog.text


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("W8A8", torch.int8),
        ("FP8 dynamic", FLOAT8),
        ("FP8 dynamic", torch.bfloat16),
        ("FP8 in blocks", torch.float32),
        ("a part is not rounded", torch.int8),
        ("head and embedding", torch.float32),
    ],
)
def test_memory_is_counted_for_what_is_held_and_one_weight_in_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: torch.dtype
) -> None:
    base = small_model(tmp_path / "base", layers=4, tied=False, hidden_size=128, intermediate_size=384)
    path = quantize(base, tmp_path / "m", BY_NAME[name])
    family, read = open_checkpoint(Located(path)), Weights._read
    weights = Weights(path, scheme=family.checkpoint.scheme)

    def unseen(weights: Weights, name: str) -> Tensor:
        with _disable_current_modes():  # a view of the file, which the system drops when it needs the memory
            return read(weights, name)

    monkeypatch.setattr(Weights, "_read", unseen)
    with Live() as live:
        model = load(family, CPU, precision, 90)
    decoder: Any = model.backbone.decoder  # type: ignore[attr-defined]
    frequencies = sum(buffer.nbytes for buffer in decoder.rotary_emb.buffers())
    packed = 0  # FBGEMM's memory, which is no tensor's
    for layer in decoder.layers:
        for projection in (
            layer.self_attn.qkv_proj,
            layer.self_attn.o_proj,
            layer.mlp.gate_up_proj,
            layer.mlp.down_proj,
        ):
            if isinstance(projection, Int8Linear):
                packed += torch.ops.quantized.linear_unpack(projection.packed)[0].numel()
    needed = sum(weight_bytes(weights, precision, QUANTIZED.get(precision, precision)))
    assert live.peak + packed - frequencies - 8 * 128 <= needed < 1.3 * (live.peak + packed)


@pytest.mark.parametrize(
    ("name", "precision", "bytes_per_weight"),
    [("W8A8", torch.int8, 6), ("FP8 dynamic", FLOAT8, 6), ("FP8 dynamic", torch.int8, 9), ("W8A8", torch.bfloat16, 0)],
)
def test_on_a_gpu_only_what_it_holds_itself_is_counted(
    tmp_path: Path, name: str, precision: torch.dtype, bytes_per_weight: int
) -> None:
    """Weights are widened on the CPU; on the GPU stored ones are compared with the widened ones."""
    base = small_model(tmp_path / "base", layers=1, tied=False, hidden_size=128, intermediate_size=384)
    path = quantize(base, tmp_path / "m", BY_NAME[name])
    weights = Weights(path, scheme=open_checkpoint(Located(path)).checkpoint.scheme)
    _, loading = weight_bytes(weights, precision, torch.bfloat16, on_cpu=False)
    assert loading == bytes_per_weight * 2 * 384 * 128


def test_damaged_scales_are_named(int8: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.mkdir()
    for file in int8.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    tensors(path, lambda f: f | {f"{UP}_scale": f[f"{UP}_scale"] * torch.nan})
    with pytest.raises(ModelLoadError, match=f"the weights are damaged: {UP} in"):
        Scorer.load(path, device="cpu", precision="float32")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: without(f, f"{UP}_scale"), f"is quantised, and {UP}_scale is missing: download"),
        (lambda f: f | {UP: f[UP].float()}, f"with {UP}_scale)"),
        (lambda f: f | {UP: f[UP].to(torch.float8_e4m3fn)}, "is F8_E4M3, which compressed-tensors, int-quantized does"),
        (lambda f: f | {f"{UP}_scale": f[f"{UP}_scale"][:-1]}, f"{UP}_scale [47, 1] of BF16 for a weight [48, 32]"),
        (lambda f: f | {f"{UP}_scale": f[f"{UP}_scale"].to(torch.int8)}, "of I8"),
        (lambda f: f | {f"{UP}_scale_inv": f[f"{UP}_scale"]}, f"with {UP}_scale_inv)"),
        (lambda f: f | {f"{UP}_g_idx": torch.zeros(32)}, f"with {UP}_g_idx)"),
        (lambda f: f | {f"{UP}_packed": torch.zeros(32)}, f"with {UP}_packed)"),
        (lambda f: f | {f"{UP}_zero_point": torch.zeros(7)}, "has another shape than"),
        (lambda f: f | {"model.norm.weight": torch.ones(32, dtype=torch.int8)}, "model.norm.weight in"),
    ],
)
def test_tensors_that_do_not_fit_together_are_refused(
    int8: Path, tmp_path: Path, change: Callable[[Tensors], Tensors], words: str
) -> None:
    scheme = read_scheme(int8, {"quantization_config": INT8.config})
    assert scheme is not None
    (tmp_path / "model.safetensors").write_bytes((int8 / "model.safetensors").read_bytes())
    tensors(tmp_path, change)
    with pytest.raises(ModelLoadError) as caught:
        scheme.layout(tmp_path, Weights(tmp_path).stored)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def without(stored: Tensors, name: str) -> Tensors:
    return {key: tensor for key, tensor in stored.items() if key != name}


def test_a_zero_point_that_config_json_promises_is_needed(int8: Path) -> None:
    scheme = read_scheme(int8, {"quantization_config": compressed_tensors(group("int", "channel", symmetric=False))})
    assert scheme is not None
    with pytest.raises(ModelLoadError, match="weight_zero_point is missing"):
        scheme.layout(int8, Weights(int8).stored)


def test_settings_without_quantised_weights_are_refused(base: Path) -> None:
    scheme = read_scheme(base, {"quantization_config": INT8.config})
    assert scheme is not None
    with pytest.raises(ModelLoadError, match="no weight is quantised: remove it"):
        scheme.layout(base, Weights(base).stored)


def test_zero_points_of_older_versions_change_nothing(float8: Path, tmp_path: Path) -> None:
    """compressed-tensors wrote zeros for symmetric weights too, in the type of the values, for which torch has no
    isfinite.
    """
    path, given = Path(shutil.copytree(float8, tmp_path / "m")), prompts(random.Random(4))
    zeros = {f"{name}_zero_point": torch.zeros(shape[0], 1).to(FLOAT8) for name, shape in _projection_shapes(path)}
    tensors(path, lambda f: f | zeros)
    weights = Weights(path, scheme=open_checkpoint(Located(path)).checkpoint.scheme)
    assert weights.precision is FLOAT8
    assert weights.not_finite() is None
    assert logits(loaded(path, FLOAT8), given) == logits(loaded(float8, FLOAT8), given)
    assert logits(loaded(path), given) == logits(loaded(float8), given)
    tensors(path, lambda f: f | {f"{UP}_scale": f[f"{UP}_scale"] * torch.nan})
    damaged = Weights(path, scheme=open_checkpoint(Located(path)).checkpoint.scheme)
    assert str(damaged.not_finite()).startswith(UP)


def _projection_shapes(path: Path) -> list[tuple[str, torch.Size]]:
    stored = load_file(path / "model.safetensors")
    return [(name, tensor.shape) for name, tensor in stored.items() if name.endswith("_proj.weight")]


@pytest.mark.parametrize("form", [INT8, BY_NAME["FP8 in blocks"]], ids=lambda form: form.name)
def test_an_adapter_is_merged_into_the_widened_weights(base: Path, tmp_path: Path, form: Form) -> None:
    path, given = quantize(base, tmp_path / "m", form), prompts(random.Random(4))
    changes = factors(base)
    for folder in (path, plain_twin(path)):
        write_adapter(tmp_path / f"adapter of {folder.name}", changes, str(folder))
    located = [locate(str(tmp_path / f"adapter of {folder.name}")) for folder in (path, plain_twin(path))]
    quantized, plain = (load(open_checkpoint(found), CPU, torch.float32, 90) for found in located)
    assert worst(logits(quantized, given), logits(plain, given)) < 1e-5
    assert worst(logits(quantized, given), logits(loaded(path), given)) > 0.1
    assert Weights(*located[0], scheme=open_checkpoint(located[0]).checkpoint.scheme).precision is None
    rounded = load(open_checkpoint(located[0]), CPU, torch.int8, 90)
    assert 1e-4 < worst(logits(rounded, given), logits(plain, given)) < 0.6


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_gpu_multiplies_float8_as_it_is_stored(tmp_path: Path, caplog: pytest.LogCaptureFixture, form: Form) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "head_dim": 32}  # multiples of 16
    path = quantize(small_model(tmp_path / "base", layers=2, tied=False, **sizes), tmp_path / "m", form)
    with caplog.at_level(logging.INFO):
        scorer = Scorer.load(path, device="cuda", precision="auto")
    capable = torch.cuda.get_device_capability() >= (8, 9)
    as_stored = capable and form.name in PER_OUTPUT | {"head and embedding"} - {"W8A8"}
    assert (scorer.info.precision == "float8") is as_stored
    assert ("taken as they are stored, in float8" in caplog.text) is as_stored
    given = prompts(random.Random(4))
    assert worst(logits(scorer.model, given), expected(path, given)) < 2.0
