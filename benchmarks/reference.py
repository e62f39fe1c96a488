"""What every contestant's scores are compared with: the model in float32, one pair at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.card import Card
from benchmarks.encoder_models import ENCODERS
from benchmarks.workloads import Requests

MAX_DOCUMENTS = 12
"""Of the workload's first request: the reference needs several times as long as the contestants."""


class Reference:
    """The probabilities of the first documents of a workload.

    Args:
        path: a folder made by `benchmarks.models.model`.
        work: the workload.
    """

    def __init__(self, path: Path, work: Requests) -> None:
        query, documents = work[0]["query"], work[0]["documents"][:MAX_DOCUMENTS]
        if path.name in ENCODERS:
            logits = _encoder(path, query, documents)
        else:
            logits = Card(path).logits(query, documents, batch=1)
        self.scores = [1 / (1 + math.exp(-logit)) for logit in logits]
        self.count = len(self.scores)

    def apart(self, scores: list[list[float]]) -> float:
        """The largest difference of a probability; NaN if a score is missing.

        Args:
            scores: of the whole workload, by request, in document order.
        """
        differences = [abs(x - y) for x, y in zip(scores[0], self.scores, strict=False)]
        return math.nan if any(map(math.isnan, differences)) else max(differences)


@torch.inference_mode()
def _encoder(path: Path, query: str, documents: list[str]) -> list[float]:
    tokenizer: Any = AutoTokenizer.from_pretrained(str(path))
    model: Any = AutoModelForSequenceClassification.from_pretrained(str(path), dtype=torch.float32).eval()
    return [
        float(model(**tokenizer(query, document, truncation=True, return_tensors="pt")).logits)
        for document in documents
    ]
