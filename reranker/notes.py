"""Notes for an operator: each text is written once, up to a limit."""

from __future__ import annotations

from collections.abc import Callable, Iterable

MAX_NOTES = 100


class Notes:
    """Writes each different text once, at most `limit` of them, then one line that says that no more follow.

    The texts name fields of clients, so both the output and this object need a limit.
    """

    def __init__(self, write: Callable[[str], None], limit: int = MAX_NOTES) -> None:
        self._write = write
        self._limit = limit
        self._written: set[str] = set()

    def add(self, texts: Iterable[str], where: str = "") -> None:
        """Write the new texts, each after `where`, which is not part of the text."""
        for text in texts:
            if text in self._written or len(self._written) > self._limit:
                continue
            full = len(self._written) == self._limit
            self._written.add(text)
            self._write(f"{self._limit} different notes were written; no more follow" if full else where + text)
