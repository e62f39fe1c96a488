"""The memory of models by precision, as a value to print."""

from __future__ import annotations

from typing import Any

from reranker.engine.budget import MIN_BATCH_TOKENS
from reranker.engine.families.official import OFFICIAL, official
from reranker.engine.plan import CARDS, PRECISIONS, allowed, describe
from reranker.engine.precision import PRECISIONS as NAMES
from reranker.engine.precision import WIDENED, short
from reranker.settings import ModelSettings


def memory_plan(settings: ModelSettings) -> dict[str, Any]:
    """Return the memory that the model of the settings needs, or the official ones if it names none.

    Raises:
        ModelLoadError: see `describe`.
    """
    name, percentage = settings.model_name_or_path, settings.max_memory_percentage
    models = [describe(name, settings.model_revision or None)] if name else list(map(official, OFFICIAL))
    wanted = NAMES.get(settings.model_precision)
    wanted = None if wanted is WIDENED else wanted  # a GPU takes what `auto` takes
    rows = []
    for model in models:
        for precision, between in PRECISIONS.items():
            if wanted in (None, precision) or (wanted, precision) == (NAMES["float16"], NAMES["bfloat16"]):
                need = model.needs(precision, between)
                sizes = {f"{name}_bytes": size for name, size in (need._asdict() | {"needed": need.needed}).items()}
                fits = {str(card): need.needed <= allowed(card, percentage) for card in CARDS}
                rows.append({"model": model.name, "precision": short(precision)} | sizes | {"fits": fits})
    return {"max_memory_percentage": percentage, "batch_tokens": MIN_BATCH_TOKENS, "models": rows}
