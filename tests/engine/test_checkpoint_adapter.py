"""LoRA adapters: the merged weights are those computed by hand, and every form that is not merged is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from reranker.engine.checkpoint.adapter import Adapter
from reranker.errors import ModelLoadError
from tests.engine.adapters import PREFIX, factors, write_adapter
from tests.engine.checkpoints import POINTER, WIDTH, small_model

Q = "model.layers.0.self_attn.q_proj"
A, B = f"{PREFIX}{Q}.lora_A.weight", f"{PREFIX}{Q}.lora_B.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_model(tmp_path_factory.mktemp("adapters") / "base", layers=1)


@pytest.fixture(scope="module")
def tensors(base: Path) -> dict[str, Tensor]:
    return factors(base)


def shapes(base: Path) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in load_file(base / "model.safetensors").items()}


@pytest.mark.parametrize(
    ("options", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 0.5}, 0.125)],
    ids=["lora", "rslora", "alpha"],
)
def test_factors_are_added_in_float32(
    base: Path, tensors: dict[str, Tensor], tmp_path: Path, options: dict[str, Any], scale: float
) -> None:
    adapter = Adapter.read(write_adapter(tmp_path / "adapter", tensors, **options))
    adapter.check(shapes(base))
    assert math.isclose(adapter.scale, scale)
    assert len(adapter.pairs) == 7
    assert not adapter.is_untrained()
    for name, weight in load_file(base / "model.safetensors").items():
        merged = adapter.merge(name, lambda _, w=weight: w.bfloat16())  # type: ignore[misc]
        a = tensors.get(f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight")
        if a is None:
            assert torch.equal(merged, weight.bfloat16())
            continue
        b = tensors[f"{PREFIX}{name.removesuffix('.weight')}.lora_B.weight"]
        expected = weight.bfloat16().double() + scale * (b.double() @ a.double())
        assert merged.dtype == torch.float32
        assert torch.allclose(merged.double(), expected, rtol=0, atol=1e-6)


def test_saved_modules_replace_weights_of_the_base(base: Path, tmp_path: Path) -> None:
    """As `modules_to_save` and SEQ_CLS write them, and the copy of a head that has factors too."""
    norm, score, head = torch.full((WIDTH,), 2.0), torch.ones(1, WIDTH), torch.ones(1026, WIDTH)
    head_a, head_b = torch.ones(4, WIDTH), torch.ones(1026, 4)
    saved = {"model.norm.weight": norm, "score.weight": score, "lm_head.base_layer.weight": head}
    pair = {"lm_head.lora_A.weight": head_a, "lm_head.lora_B.weight": head_b}
    named = {PREFIX + name: tensor for name, tensor in (saved | pair).items()}
    adapter = Adapter.read(write_adapter(tmp_path / "adapter", named, task_type="SEQ_CLS"))
    assert not adapter.is_untrained()
    adapter.check(shapes(base) | {"score.weight": (1, WIDTH), "lm_head.weight": (1026, WIDTH)})
    assert adapter.task == "SEQ_CLS"

    def base_weight(name: str) -> Tensor:
        raise AssertionError(f"{name} of the base was read")

    for name, expected in (("model.norm.weight", norm), ("score.weight", score), ("lm_head.weight", head + 8)):
        assert torch.equal(adapter.merge(name, base_weight), expected)
    assert str(adapter).endswith("1 projections, saved lm_head.weight, model.norm.weight, score.weight)")


def test_the_task_is_that_of_the_trained_class_where_none_is_named(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    for name, task in (("Qwen3ForSequenceClassification", "SEQ_CLS"), ("Qwen3ForCausalLM", None)):
        mapping = {"base_model_class": name}
        folder = write_adapter(tmp_path / "adapter", tensors, task_type=None, auto_mapping=mapping)
        assert Adapter.read(folder).task == task


@pytest.mark.parametrize("side", [A, B])
def test_an_adapter_whose_products_are_zero_is_untrained(tmp_path: Path, tensors: dict[str, Tensor], side: str) -> None:
    own = {A: tensors[A], B: tensors[B]}
    assert not Adapter.read(write_adapter(tmp_path / "trained", own)).is_untrained()
    norm = {f"{PREFIX}model.norm.weight": torch.ones(WIDTH)}
    assert not Adapter.read(write_adapter(tmp_path / "saved", norm)).is_untrained()
    assert Adapter.read(write_adapter(tmp_path / "new", own | {side: torch.zeros_like(own[side])})).is_untrained()


REFUSED_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "ia3": ({"peft_type": "IA3"}, "'IA3'"),
    "loha": ({"peft_type": "LOHA"}, "'LOHA'"),
    "adalora": ({"peft_type": "ADALORA"}, "'ADALORA'"),
    "prompt tuning": ({"peft_type": "PROMPT_TUNING"}, "'PROMPT_TUNING'"),
    "no type": ({"peft_type": None}, "None"),
    "embeddings": ({"task_type": "FEATURE_EXTRACTION"}, "FEATURE_EXTRACTION"),
    "dora": ({"use_dora": True}, "use_dora"),
    "ranks": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
    "alphas": ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    "bias": ({"bias": "lora_only"}, "bias='lora_only'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "replicated": ({"layer_replication": [[0, 1], [0, 1]]}, "layer_replication"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "parameters": ({"target_parameters": ["experts"]}, "target_parameters"),
    "activated": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "unknown": ({"invented_in_2027": 3}, "invented_in_2027"),
    "pissa": ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4', which changes the base"),
    "olora": ({"init_lora_weights": "olora"}, "'olora'"),
    "loftq": ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "'loftq'"),
    "rank": ({"r": 8}, "lora_A.weight in .* has the rank 4, and .* r=8"),
    "no rank": ({"r": None}, "r=None"),
    "zero rank": ({"r": 0}, "r=0"),
    "true rank": ({"r": True}, "r=True"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha=None"),
    "text alpha": ({"lora_alpha": "16"}, "lora_alpha=16"),
    "zero alpha": ({"lora_alpha": 0}, "lora_alpha=0: .* with 0 nothing is merged"),
    "huge alpha": ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    "text for a boolean": ({"use_rslora": "false"}, "use_rslora='false'"),
    "revision": ({"revision": 1}, "revision"),
}


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_an_option_that_is_not_merged_is_refused_by_name(tmp_path: Path, tensors: dict[str, Tensor], name: str) -> None:
    options, message = REFUSED_OPTIONS[name]
    folder = write_adapter(tmp_path / "adapter", {A: tensors[A], B: tensors[B]}, **options)
    with pytest.raises(ModelLoadError, match=message) as raised:
        Adapter.read(folder)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": "gaussian"},
        {"auto_mapping": "Qwen3ForCausalLM", "task_type": "CAUSAL_LM"},
        {"init_lora_weights": "eva", "eva_config": {"rho": 1.0}},
        {"layers_to_transform": [0], "layers_pattern": "layers", "exclude_modules": ["lm_head"]},
        {"lora_dtype": "float32", "lorap_lr_ratio": 16.0, "lorap_emb_lr": 1e-6},
        {"target_modules": "all-linear", "modules_to_save": ["classifier", "score"], "ensure_weight_tying": True},
    ],
)
def test_options_of_training_alone_change_nothing(
    tmp_path: Path, tensors: dict[str, Tensor], options: dict[str, Any]
) -> None:
    assert len(Adapter.read(write_adapter(tmp_path / "adapter", tensors, **options)).pairs) == 7


def test_the_oldest_form_of_the_config_is_read(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_adapter(tmp_path / "adapter", tensors)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "base_model_name_or_path": "Qwen/Qwen3-Reranker-4B"}
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    adapter = Adapter.read(folder)
    assert (adapter.base, adapter.task, adapter.scale) == ("Qwen/Qwen3-Reranker-4B", None, 4.0)


WIDE = f"{PREFIX}model.embed_tokens"
REFUSED_TENSORS: dict[str, tuple[dict[str, Tensor], str]] = {
    "one factor": ({A: torch.ones(4, WIDTH)}, "has no lora_B"),
    "the other factor": ({B: torch.ones(48, 4)}, "has no lora_A"),
    "magnitudes": ({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(48)}, "lora_magnitude_vector"),
    "embedding": ({f"{WIDE}.lora_embedding_A": torch.ones(4, 1026)}, "lora_embedding_A"),
    "bias of B": ({f"{PREFIX}{Q}.lora_B.bias": torch.ones(48)}, "lora_B.bias"),
    "tokens": ({f"{WIDE}.token_adapter.trainable_tokens_delta": torch.ones(1, WIDTH)}, "token_adapter"),
    "adapter's name": ({f"{PREFIX}{Q}.lora_A.default.weight": torch.ones(4, WIDTH)}, "lora_A.default"),
    "no prefix": ({f"{Q}.lora_A.weight": torch.ones(4, WIDTH)}, "not a name of peft's"),
    "a convolution": ({A: torch.ones(4, WIDTH, 1)}, "not a matrix"),
    "nothing": ({}, "holds no tensors"),
    "integers": ({A: torch.ones(4, WIDTH, dtype=torch.int8)}, "is I8"),
    "both": (
        {A: torch.ones(4, WIDTH), B: torch.ones(48, 4), f"{PREFIX}{Q}.weight": torch.ones(48, WIDTH)},
        "only one can be meant",
    ),
    "twice": (
        {f"{PREFIX}{Q}.base_layer.weight": torch.ones(48, WIDTH), f"{PREFIX}{Q}.weight": torch.ones(48, WIDTH)},
        "there twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED_TENSORS)
def test_a_tensor_that_cannot_be_merged_is_refused_by_name(tmp_path: Path, name: str) -> None:
    own, message = REFUSED_TENSORS[name]
    with pytest.raises(ModelLoadError, match=message):
        Adapter.read(write_adapter(tmp_path / "adapter", own))


PLACES: dict[str, tuple[dict[str, Tensor], str]] = {
    "another width": ({A: torch.ones(4, 64), B: torch.ones(48, 4)}, r"is for a weight of \[48, 64\], and"),
    "another module": (
        {f"{PREFIX}model.layers.0.x.lora_A.weight": torch.ones(4, WIDTH)}
        | {f"{PREFIX}model.layers.0.x.lora_B.weight": torch.ones(4, 4)},
        "x.lora_A.weight in .* matches no weight of the base",
    ),
    "more layers": ({f"{PREFIX}model.layers.9.input_layernorm.weight": torch.ones(WIDTH)}, "matches no weight"),
    "resized embedding": ({f"{WIDE}.weight": torch.ones(1030, WIDTH)}, r"\[1030, 32\]"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_tensor_without_its_place_in_the_base_is_refused(base: Path, tmp_path: Path, name: str) -> None:
    own, message = PLACES[name]
    adapter = Adapter.read(write_adapter(tmp_path / "adapter", own))
    with pytest.raises(ModelLoadError, match=message):
        adapter.check(shapes(base))


def test_broken_and_missing_files_are_refused(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    folder = write_adapter(tmp_path / "adapter", tensors)
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content = file.read_bytes()
    for wrong, message in ((content[:1000], "half downloaded"), (POINTER, "git lfs pull")):
        file.write_bytes(wrong)
        with pytest.raises(ModelLoadError, match=message):
            Adapter.read(folder)
    file.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match="a pickle, which is not read"):
        Adapter.read(folder)
    (folder / "adapter_model.bin").unlink()
    with pytest.raises(ModelLoadError, match=r"without adapter_model\.safetensors"):
        Adapter.read(folder)
    config.unlink()
    with pytest.raises(ModelLoadError, match=r"without adapter_config\.json"):
        Adapter.read(folder)
