"""Make any Python string acceptable to a tokenizer."""

from __future__ import annotations


def printable(text: str) -> str:
    """Replace lone surrogates, which no tokenizer accepts, by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
