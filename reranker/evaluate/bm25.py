"""First-stage candidates by BM25, for data without a run file."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from reranker.errors import InputError
from reranker.evaluate.judgements import Ranking

# Chinese and Japanese have no spaces between words, so that characters and pairs of them count as words.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUN = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Return lower-case words; no stemming or stop words, so that all languages are treated alike."""
    result: list[str] = []
    for run in _RUN.findall(text.lower()):
        if re.match(rf"[{_UNSPACED}]", run):
            result += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            result.append(run)
    return result


def candidates(corpus: Mapping[str, str], queries: Mapping[str, str], count: int) -> Ranking:
    """Return the best `count` documents of each query that share a word with it, with their scores.

    Raises:
        InputError: no document has a word.
    """
    import bm25s

    names = list(corpus)
    documents = [words(corpus[name]) for name in names]
    if not any(documents):
        raise InputError("the corpus holds no words")
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # it sets itself to DEBUG
    index = bm25s.BM25()
    index.index(documents, show_progress=False)
    ranking: Ranking = {}
    for query, text in queries.items():
        known = [word for word in words(text) if word in index.vocab_dict]
        ranking[query] = {}
        if known:
            places, scores = index.retrieve([known], k=min(count, len(names)), show_progress=False)
            found = zip(places[0], scores[0], strict=True)
            ranking[query] = {names[i]: float(score) for i, score in found if score > 0}
    return ranking
