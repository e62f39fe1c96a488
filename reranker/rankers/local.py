"""Scores from a model in this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from reranker.engine.scorer import Scorer
from reranker.engine.scores import sigmoid
from reranker.engine.stream import rerank_many
from reranker.errors import RerankError
from reranker.rankers.ranker import Scored
from reranker.settings import ModelSettings
from reranker.terminal import note
from reranker.types import RerankRequest


class Local:
    """A loaded model; see `Scorer.load` for errors."""

    def __init__(self, model: ModelSettings) -> None:
        self.scorer = Scorer.load(**model.load_options())
        if self.scorer.info.demo:
            note("the bundled demo model is for trying only; choose another with --model")

    def rank_many(self, requests: Iterable[RerankRequest]) -> Iterator[Scored | RerankError]:
        """See `Ranker.rank_many`."""
        for outcome in rerank_many(self.scorer, requests):
            if isinstance(outcome, RerankError):
                yield outcome
            else:
                scores = [sigmoid(logit) for logit in outcome.logits]
                yield Scored(scores, outcome.truncated_documents, outcome.query_truncated)

    @property
    def facts(self) -> dict[str, str | int]:
        """See `Ranker.facts`."""
        info = self.scorer.info
        names = ("prompt", "device", "precision", "max_seq_length", "max_batch_tokens", "self_check")
        adapter = {"adapter": info.adapter} if info.adapter else {}
        computed = {"family": info.family, "logit": info.score}  # `check` prints a score as "score"
        return {"model": info.name} | adapter | computed | {name: getattr(info, name) for name in names}
