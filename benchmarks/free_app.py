"""The real application around a model that costs nothing: the time of a request is the service's own work.

With TOKENISED=1 a request is tokenised (the demo model's tokenizer) and packed as ever, and only the forward pass is
free; else nothing of the scorer costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from app import create_app
from config import load_settings
from reranker.engine.batch import pack
from reranker.engine.checkpoint.tokenizer import load_tokenizer
from reranker.engine.families.qwen3 import TEMPLATE
from reranker.engine.prompt import Prompt
from reranker.engine.scorer import DEMO
from reranker.scheduler.compute import ScorerLike
from reranker.types import EncodedRequest, ModelInfo, RerankRequest, Slice


class FreeScorer:
    """Every document has the same tokens and a logit of 0."""

    memory = 0
    max_batch_tokens = 262_144
    max_batch_documents = 1 << 30
    lanes = None
    info = ModelInfo("free", "none", "float32", 8192, max_batch_tokens)

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """No tokenizer."""
        return EncodedRequest([0] * 50, [[0] * 10] * len(request.documents))

    def pack(self, slices: Sequence[Slice]) -> Any:
        """Nothing to lay out."""
        return slices

    def score(self, batch: Any) -> list[float]:
        """Return immediately."""
        return [0.0] * sum(part.stop - part.start for part in getattr(batch, "slices", batch))


class TokenisingScorer(FreeScorer):
    """Costs all that a request costs but its forward pass."""

    def __init__(self) -> None:
        self.prompt = Prompt(load_tokenizer(DEMO), TEMPLATE)

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """As the engine does."""
        return self.prompt.encode(request, self.prompt.static_prefix)

    def pack(self, slices: Sequence[Slice]) -> Any:
        """As the engine does."""
        return pack(slices, static_prefix_len=len(self.prompt.static_prefix))


def load() -> ScorerLike:
    """As the environment says."""
    return TokenisingScorer() if os.environ.get("TOKENISED") else FreeScorer()


app = create_app(load_settings(), load)
