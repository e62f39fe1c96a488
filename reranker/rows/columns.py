"""Which column holds an id, a grade or a text, by its name; and ids as text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from reranker.errors import InputError
from reranker.terminal import name_list, note

TEXT_NAMES = tuple(
    "text document documents passage content contents body chunk page_content 文本 内容 正文 文档 段落".split()
)
"""Names of a text, the preferred one first; compared without case."""
# Compared without case, blanks, - and _.
QUERY_NAMES = ("queryid", "qid", "topicid", "query", "topic", "q")
DOCUMENT_NAMES = ("corpusid", "documentid", "docid", "passageid", "pid", "did", "docno", "document", "doc", "passage")
GRADE_NAMES = ("score", "relevance", "rel", "grade", "label", "qrel", "judgement", "judgment")
ID_NAMES = ("id", *DOCUMENT_NAMES[:7], *QUERY_NAMES[:3])
"""Names of the id of a text."""


def fold(column: str) -> str:
    """Return a name without case and surrounding white space."""
    return column.strip().casefold()


def find(columns: Sequence[str], names: Sequence[str]) -> str | None:
    """Return the first of `columns` in the order of `names`; None if there is none."""
    plain = {re.sub(r"[\s_-]", "", column.casefold()): column for column in reversed(columns)}
    return next((plain[name] for name in names if name in plain), None)


def find_text(
    columns: Sequence[str], field: str | None, name: str, noun: str = "column", fix: str = "name one with --field"
) -> str:
    """Return the column, or key (`noun`), of the text: `field`, else the first of the known names.

    Raises:
        InputError: there is none, or two of them; lists the columns of the file `name`, and the `fix`.
    """
    if field is not None and columns.count(field) == 1:
        return field
    folded = [fold(column) for column in columns]
    wanted = TEXT_NAMES if field is None else (fold(field),)
    column = next((columns[folded.index(name)] for name in wanted if name in folded), None)
    if column is None:
        problem = f"does not tell which {noun} holds the text" if field is None else f"has no {noun} {field!r}"
        existing = f"its {noun}s are {name_list(columns)}" if columns else f"it has no {noun}s"
        raise InputError(f"{name} {problem}; {existing}: {fix}")
    require_once(columns, (column,), name, noun)
    return column


def require_once(columns: Sequence[str], wanted: Iterable[str], name: str, noun: str = "column") -> None:
    """Refuse a heading with one of the wanted columns twice, in any case: only the last would be read."""
    folded = [fold(column) for column in columns]
    for column in wanted:
        if folded.count(fold(column)) > 1:
            raise InputError(f"{name} has the {noun} {column!r} twice; rename one")


def read_id(value: object) -> str:
    """Return an id as text; empty if the value is not an id.

    pandas writes the number 12 as 12.0 in a column with missing values, so both mean the same.
    """
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, str) and re.fullmatch(r"\d+\.0", value):
        note("ids such as 12.0 are read as 12")
        return value[:-2]
    return str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
