"""Rank a few obvious texts at load: a checkpoint that ranks one of them wrong does not behave like a reranker.

A model that loads without an error may still be another kind of model, or a damaged one; only its scores show that.
Three queries with three texts each: random scores pass in a language once in 27 times.
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

_TEXTS = {
    "English": (
        ("how to compress files", "gzip compresses files with the deflate algorithm to save disk space"),
        ("how is chess played", "chess is a board game for two players, who move sixteen pieces each"),
        ("what does the flu feel like", "the flu begins with fever, cough and aching muscles"),
    ),
    "Chinese": (
        ("如何压缩文件", "gzip 用 deflate 算法压缩文件，可以节省磁盘空间"),
        ("国际象棋怎么下", "国际象棋是两个人玩的棋类游戏，双方各有十六枚棋子"),
        ("流感有什么症状", "流感的症状是发烧、咳嗽和肌肉酸痛"),
    ),
}
"""Language -> queries and their texts; the other texts of the language are unrelated to a query."""


def self_check(scorer: Scorer, instruction: str) -> str:
    """Rank the texts of each language; return `passed`, `failed`, or `not run`, with the languages or the reason.

    One language is enough to pass: many encoders are trained on English alone.

    `instruction` is the checkpoint's, not the operator's, because a custom one may ask for the opposite.
    """
    wrong: list[str] = []
    for language, pairs in _TEXTS.items():
        for query, text in pairs:
            others = [other for _, other in pairs if other is not text]
            try:
                request = scorer.encode(RerankRequest(query, [text, *others], instruction, truncate=False))
            except InvalidRequestError:
                return "not run: MAX_SEQ_LENGTH leaves no room for it"
            relevant, *unrelated = scorer.score(scorer.pack([Slice(request, 0, len(pairs))]))
            if not (math.isfinite(relevant) and all(relevant > logit for logit in unrelated)):
                wrong.append(language)
                break
    if not wrong:
        return "passed"
    if right := [language for language in _TEXTS if language not in wrong]:
        problem = "self-check: this model ranks obvious texts right in %s, but not in %s: use it for %s only"
        logger.warning(problem, right[0], wrong[0], right[0])
        return f"passed: {right[0]} only"
    logger.warning(
        "self-check failed (%s): an obviously relevant text does not get a higher score than an unrelated one; this "
        "checkpoint does not behave like a reranker: check the source of its weights",
        ", ".join(wrong),
    )
    return f"failed: {', '.join(wrong)}"
