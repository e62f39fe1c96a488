"""The registry of model families: config.json decides which one computes a checkpoint."""

from __future__ import annotations

from reranker.engine.checkpoint.config import Checkpoint
from reranker.engine.families.base import Family
from reranker.engine.families.qwen3 import Qwen3
from reranker.errors import ModelLoadError

FAMILIES: dict[tuple[str, str], type[Family]] = {("qwen3", "Qwen3ForCausalLM"): Qwen3}
"""By model_type and architecture; a config.json without architectures gets the first of its model_type."""


def family_of(checkpoint: Checkpoint) -> Family:
    """Return the family that computes a checkpoint.

    Raises:
        ModelLoadError: no family does, or the checkpoint lacks a part that its family needs.
    """
    kind, names = checkpoint.config.model_type, checkpoint.config.architectures
    for (model_type, architecture), family in FAMILIES.items():
        if kind == model_type and (not names or architecture in names):
            return family(checkpoint)
    served = ", ".join(architecture for _, architecture in FAMILIES)
    raise ModelLoadError(
        f"{checkpoint.path / 'config.json'} has model_type {kind!r} and architectures {names}: only {served} is served"
    )
