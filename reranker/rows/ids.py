"""Ids of queries and documents as text, and the columns that hold ids and grades."""

from __future__ import annotations

import re
from collections.abc import Sequence

from reranker.terminal import note

# Without case, blanks, - and _.
QUERY = ("queryid", "qid", "topicid", "query", "topic", "q")
DOCUMENT = ("corpusid", "documentid", "docid", "passageid", "pid", "did", "docno", "document", "doc", "passage")
GRADE = ("score", "relevance", "rel", "grade", "label", "qrel", "judgement", "judgment")
ID = ("id", *DOCUMENT[:7], *QUERY[:3])
"""Of a file of texts."""


def read_id(value: object) -> str:
    """An id as text; empty where it is none.

    pandas writes the number 12 as 12.0 in a column in which another row has none, so both mean the same.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and re.fullmatch(r"\d+\.0", value):
        note("ids such as 12.0 are read as 12")
        return value[:-2]
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""


def column(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of `columns` in the order of `names`; None where there is none."""
    plain = {re.sub(r"[\s_-]", "", column.casefold()): column for column in reversed(columns)}
    return next((plain[name] for name in names if name in plain), None)
