"""Score heads with labels: one, or two of which the second is relevance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from reranker.engine.checkpoint.files import refuse_if
from reranker.engine.families.base import Head

_RELEVANT = ("yes", "true", "1", "relevant", "positive", "entailment")
"""Names of the label for a relevant document."""


def check_labels(file: Path, config: PretrainedConfig) -> None:
    """Refuse a head with other labels; `file` is config.json."""
    count = config.num_labels
    problem = f"{file} has {count} labels"
    refuse_if(count not in (1, 2), f"{problem}: a reranker has 1, or 2 of which the second is relevant")
    labels: Any = config.id2label or {}  # keys are integers, which transformers' annotation denies
    first = labels.get(0)  # by its row of the head: the JSON may have another order
    reversed_order = count == 2 and str(first).lower() in _RELEVANT
    refuse_if(reversed_order, f"{problem}, the first is {first!r}: the second one must be that of relevance")


def label_head(path: Path, rows: Tensor, biases: Tensor | None = None) -> Head:
    """Return the head for rows [labels, hidden_size] and biases [labels]; of two labels, the second - the first.

    Raises:
        ModelLoadError: every document would get the same score; `path` is for the error.
    """
    rows = rows.to(torch.float32, copy=True)
    biases = torch.zeros(len(rows)) if biases is None else biases.float()
    two = len(rows) == 2
    name = "score head, second label - first" if two else "score head"
    weight, bias = (rows[1] - rows[0], biases[1] - biases[0]) if two else (rows[0], biases[0])
    problem = f"{name} in {path} is the same for every document"
    refuse_if(not weight.any(), f"{problem}: the head was not saved with the model")
    return Head(weight, bias.item(), name)
