"""Score two obvious pairs at load: a checkpoint that ranks one of them wrong does not behave like a reranker.

A model that loads without an error may still be another kind of model, or a damaged one; only its scores show that.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from reranker.errors import InvalidRequestError
from reranker.types import RerankRequest, Slice

if TYPE_CHECKING:
    from reranker.engine.scorer import Scorer

logger = logging.getLogger(__name__)

_PAIRS = {
    "English": (
        "how to compress files",
        "gzip compresses files with the deflate algorithm to save disk space",
        "chess is a board game for two players",
    ),
    "Chinese": ("如何压缩文件", "gzip 用 deflate 算法压缩文件，可以节省磁盘空间", "国际象棋是两个人玩的棋类游戏"),
}
"""Language -> query, relevant text, unrelated text."""


def self_check(scorer: Scorer, instruction: str) -> str:
    """Rank the pair of each language; return `passed`, `failed`, or `not run`, with the languages or the reason.

    One language is enough to pass: many encoders are trained on English alone.

    `instruction` is the checkpoint's, not the operator's, because a custom one may ask for the opposite.
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
    if right := [language for language in _PAIRS if language not in wrong]:
        problem = "self-check: this model ranks an obvious pair right in %s, but not in %s: use it for %s only"
        logger.warning(problem, right[0], wrong[0], right[0])
        return f"passed: {right[0]} only"
    logger.warning(
        "self-check failed (%s): an obviously relevant text does not get a higher score than an unrelated one; this "
        "checkpoint does not behave like a reranker: check the source of its weights",
        ", ".join(wrong),
    )
    return f"failed: {', '.join(wrong)}"
