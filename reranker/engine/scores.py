"""From logits to relevance scores; free of torch."""

from __future__ import annotations

import math


def sigmoid(logit: float) -> float:
    """The probability of "yes": the card's softmax over the two logits equals this of their difference."""
    return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))
