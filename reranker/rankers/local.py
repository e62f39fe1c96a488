"""Scores from a model in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from reranker.engine.scorer import DEMO, Scorer
from reranker.engine.scores import sigmoid
from reranker.engine.stream import rerank_many
from reranker.errors import RerankError
from reranker.rankers.ranker import Scored
from reranker.types import RerankRequest


class Local:
    """A loaded model.

    Args:
        model: keywords of `Scorer.load`; a `model` of None is the bundled demo.

    Raises:
        ModelLoadError: it cannot be served.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        rest = {key: value for key, value in model.items() if key not in ("model", "instruction")}
        name, instruction = model["model"] or DEMO, model["instruction"] or None
        self.scorer = Scorer.load(name, instruction=instruction, **rest)
        if self.scorer.info.demo:
            print("note: the bundled demo model is for trying only; choose another with --model", file=sys.stderr)

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        """See `Ranker.rank_many`."""
        for outcome in rerank_many(self.scorer, requests):
            if isinstance(outcome, RerankError):
                yield outcome
            else:
                scores = [sigmoid(logit) for logit in outcome.logits]
                yield Scored(scores, outcome.truncated_documents, outcome.query_truncated)

    @property
    def facts(self) -> dict[str, str]:
        """See `Ranker.facts`."""
        info = self.scorer.info
        return {
            "model": info.name,
            "device": info.device,
            "precision": info.precision,
            "max_seq_length": str(info.max_seq_length),
            "max_batch_tokens": str(info.max_batch_tokens),
            "self_check": info.self_check,
        }
