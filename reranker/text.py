"""Text that a tokenizer accepts."""

from __future__ import annotations


def printable(text: str) -> str:
    """`text` with lone surrogates, which no tokenizer accepts, replaced by U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
