"""First-stage candidates by BM25, for data that comes without a run file."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

from reranker.errors import InputError
from reranker.evaluate.judgements import Ranking

# Chinese and Japanese are written without spaces: their characters are words, and so are pairs of them.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_RUN = re.compile(rf"[{_UNSPACED}]+|[^\W{_UNSPACED}]+")


def words(text: str) -> list[str]:
    """Lower-case words, without stemming or stop words, so that it is the same for every language."""
    found: list[str] = []
    for run in _RUN.findall(text.lower()):
        if re.match(rf"[{_UNSPACED}]", run):
            found += [*run, *(run[i : i + 2] for i in range(len(run) - 1))]
        else:
            found.append(run)
    return found


def candidates(corpus: Mapping[str, str], queries: Mapping[str, str], count: int) -> Ranking:
    """The best `count` documents of each query that share a word with it.

    Raises:
        InputError: no document holds a word.
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
        ranking[query] = []
        if known:
            places, scores = index.retrieve([known], k=min(count, len(names)), show_progress=False)
            ranking[query] = [names[i] for i, score in zip(places[0], scores[0], strict=True) if score > 0]
    return ranking
