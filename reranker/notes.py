"""Notes for an operator: each text is written once, and their number is limited."""

from __future__ import annotations

from collections.abc import Callable, Iterable

MAX_NOTES = 100


class Notes:
    """Write each different text once, at most `limit` of them, and then one line that says that it stops.

    The texts name fields of clients, so both the output and this object need a limit.

    Args:
        say: writes one line.
        limit: different texts.
    """

    def __init__(self, say: Callable[[str], None], limit: int = MAX_NOTES) -> None:
        self._say = say
        self._limit = limit
        self._said: set[str] = set()

    def add(self, texts: Iterable[str], where: str = "") -> None:
        """Write the texts that are new, each after `where`, which does not count as a part of the text."""
        for text in texts:
            if text in self._said or len(self._said) > self._limit:
                continue
            full = len(self._said) == self._limit
            self._said.add(text)
            self._say(f"{self._limit} different notes were written; no more follow" if full else where + text)
