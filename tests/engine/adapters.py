"""LoRA adapters as peft writes them, with random factors, and their bases merged by hand."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.engine.checkpoints import EMBEDDING, HEAD, settings

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
PREFIX = "base_model.model."
RANK, ALPHA = 4, 8

DEFAULTS: dict[str, Any] = {
    **dict.fromkeys("alora_invocation_tokens arrow_config auto_mapping corda_config eva_config".split()),
    **dict.fromkeys("exclude_modules kasa_config layer_replication layers_pattern layers_to_transform".split()),
    **dict.fromkeys("lora_ga_config megatron_config modules_to_save monteclora_config revision".split()),
    **dict.fromkeys("target_parameters trainable_token_indices use_bdlora velora_config".split()),
    **dict.fromkeys("ensure_weight_tying fan_in_fan_out lora_bias use_dora use_qalora use_rslora".split(), False),
    "alpha_pattern": {},
    "loftq_config": {},
    "rank_pattern": {},
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.05,
    "megatron_core": "megatron.core",
    "qalora_group_size": 16,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
}
"""adapter_config.json of peft 0.21.2."""


def factors(base: Path, targets: Sequence[str] = ALL, rank: int = RANK) -> dict[str, Tensor]:
    """Random factors for each projection of `base` with one of the names, in peft's names."""
    random = torch.Generator().manual_seed(1)
    made: dict[str, Tensor] = {}
    for name, weight in load_file(base / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if module.rpartition(".")[2] in targets:
            for side, shape in (("A", (rank, weight.shape[1])), ("B", (weight.shape[0], rank))):
                made[f"{PREFIX}{module}.lora_{side}.weight"] = torch.randn(shape, generator=random) * 0.3
    return made


def write_adapter(folder: Path, tensors: dict[str, Tensor], base: str = "", **options: Any) -> Path:
    """Write the two files of an adapter."""
    folder.mkdir(exist_ok=True)
    settings = DEFAULTS | {"base_model_name_or_path": base} | options
    (folder / "adapter_config.json").write_text(json.dumps(settings), encoding="utf-8")
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    return folder


def merged_by_hand(base: Path, tensors: dict[str, Tensor], folder: Path, scale: float = ALPHA / RANK) -> Path:
    """Write a copy of the base whose weights have the adapter added in float64, stored in float32."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    if HEAD not in weights:  # tied in the base
        settings(tie_word_embeddings=False)(folder)
        weights[HEAD] = weights[EMBEDDING].clone()
    for name, tensor in tensors.items():
        module = name.removeprefix(PREFIX)
        if module.endswith(".lora_A.weight"):
            weight = module.replace(".lora_A", "")
            delta = tensors[name.replace("lora_A", "lora_B")].double() @ tensor.double() * scale
            weights[weight] = (weights[weight].double() + delta).float()
        elif ".lora_B" not in module:
            weights[module] = tensor
    stored = {name: weight.float().contiguous() for name, weight in weights.items()}
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder
