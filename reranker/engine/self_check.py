"""Score two obvious pairs at the start: a checkpoint that ranks them wrong does not behave like a reranker.

A model that loads without an error may still be no reranker, or one that was saved half: no file says so, scores do.
"""

from __future__ import annotations

import logging
import math
from typing import Any, Protocol

from reranker.errors import InvalidRequestError
from reranker.types import EncodedRequest, RerankRequest, Slice

logger = logging.getLogger(__name__)

_PAIRS = {
    "English": (
        "how to compress files",
        "gzip compresses files with the deflate algorithm to save disk space",
        "chess is a board game for two players",
    ),
    "Chinese": ("如何压缩文件", "gzip 用 deflate 算法压缩文件，可以节省磁盘空间", "国际象棋是两个人玩的棋类游戏"),
}
"""Language -> query, a text that answers it, a text of something else."""


class _Scorer(Protocol):
    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Texts to tokens."""

    def pack(self, slices: list[Slice]) -> Any:
        """Lay slices out for one forward pass."""

    def score(self, batch: Any) -> list[float]:
        """Logits of the batch's documents."""


def self_check(scorer: _Scorer, instruction: str) -> str:
    """Rank the pairs of each language; return `passed`, or `failed: ` and the languages that were ranked wrong.

    Args:
        scorer: warmed up.
        instruction: the one that the checkpoint was trained with: an operator's own may ask for the opposite.
    """
    wrong: list[str] = []
    for language, (query, relevant, unrelated) in _PAIRS.items():
        try:
            request = scorer.encode(RerankRequest(query, [relevant, unrelated], instruction, truncate=False))
        except InvalidRequestError:
            return "not run: MAX_SEQ_LENGTH leaves no room for it"
        high, low = scorer.score(scorer.pack([Slice(request, 0, 2)]))
        if not (math.isfinite(high) and high > low):
            wrong.append(language)
    if not wrong:
        return "passed"
    logger.warning(
        "self-check failed (%s): an obviously relevant text does not get a higher score than an unrelated one. This "
        "checkpoint does not behave like a reranker: look at where its weights come from",
        ", ".join(wrong),
    )
    return f"failed: {', '.join(wrong)}"
