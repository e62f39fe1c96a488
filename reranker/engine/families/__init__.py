"""The registry of model families: config.json decides which one computes a checkpoint."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from reranker.engine.checkpoint.config import read, read_settings
from reranker.engine.checkpoint.layout import refuse_dense
from reranker.engine.checkpoint.locate import Located
from reranker.engine.families.base import Family
from reranker.engine.families.bert import Bert, XlmRoberta
from reranker.engine.families.modernbert import ModernBert
from reranker.engine.families.qwen2 import Qwen2
from reranker.engine.families.qwen3 import Qwen3
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)

FAMILIES: dict[tuple[str, str], type[Family]] = {
    ("qwen3", "Qwen3ForCausalLM"): Qwen3,
    ("qwen3", "Qwen3ForSequenceClassification"): Qwen3,
    ("qwen2", "Qwen2ForCausalLM"): Qwen2,
    ("qwen2", "Qwen2ForSequenceClassification"): Qwen2,
    ("bert", "BertForSequenceClassification"): Bert,
    ("xlm-roberta", "XLMRobertaForSequenceClassification"): XlmRoberta,
    ("modernbert", "ModernBertForSequenceClassification"): ModernBert,
}
"""By model_type and architecture; a config.json without architectures gets the first of its model_type."""
_OWN_CODE = "is computed by code in its checkpoint, which is never run"
_UNSERVED = {
    "new": ("gte-multilingual-reranker", _OWN_CODE),
    "xlm-roberta-flash": ("jina-reranker-v2", _OWN_CODE),
    "llama_bidirec": ("llama-nemotron-rerank", _OWN_CODE),
    "NewForSequenceClassification": ("gte-multilingual-reranker", _OWN_CODE),
    "LlamaBidirectionalForSequenceClassification": ("llama-nemotron-rerank", _OWN_CODE),
    "JinaForRanking": ("jina-reranker-v3", "reads all documents of a request in one prompt"),
}
"""Rerankers that people try, by model_type or architecture: their name, and why they are not served."""
_INSTEAD = "use a model such as BAAI/bge-reranker-v2-m3 or Qwen/Qwen3-Reranker-0.6B (docs/models.md)"


def open_checkpoint(located: Located) -> Family:
    """Read all but the weights of a checkpoint that `locate` returned, for the family that computes it.

    Raises:
        ModelLoadError: a file cannot be read, or no family computes the model.
    """
    path, adapter = located
    settings = read_settings(located)
    family = family_of(path, settings)
    family.check_settings(path / "config.json", settings)
    checkpoint = read(located, settings)
    if adapter is not None:
        logger.info("merging the LoRA adapter %s", checkpoint.merged)
        if adapter.is_untrained():
            problem = "the LoRA adapter in %s changes no projection (every lora_B is zero)"
            logger.warning(problem + ": it was not trained, or not saved", adapter.folder)
    return family(checkpoint)


def family_of(path: Path, settings: dict[str, Any]) -> type[Family]:
    """Return the family for the settings in config.json.

    Raises:
        ModelLoadError: there is none.
    """
    kind, names = settings.get("model_type"), settings.get("architectures") or []
    for key in (kind, *(names if isinstance(names, list) else [names])):
        if isinstance(key, str) and key in _UNSERVED:
            name, why = _UNSERVED[key]
            raise ModelLoadError(f"{path} ({key}) is {name} or a model like it, which {why}: {_INSTEAD}")
    if kind == "xlm-roberta" and "auto_map" in settings:
        raise ModelLoadError(f"{path} is jina-reranker-v2 or a model like it, which {_OWN_CODE}: {_INSTEAD}")
    families = {architecture: family for (model_type, architecture), family in FAMILIES.items() if model_type == kind}
    if not families:
        kinds = " or ".join(sorted({repr(model_type) for model_type, _ in FAMILIES}))
        raise ModelLoadError(f"model_type is {kind!r}, not {kinds}: this model is not served (see docs/models.md)")
    for architecture, family in families.items():
        if not names or (isinstance(names, list) and architecture in names):
            return family
    name = str(names[0] if isinstance(names, list) else names)[:60]
    why = f"is not served: only {', '.join(families)} are"
    if name.endswith("Model"):
        refuse_dense(path)
        why = f"is saved without its head, as embedding models are: use a reranker ({', '.join(families)})"
    raise ModelLoadError(f"the architecture {name} of {path} {why}")
