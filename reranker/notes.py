"""Notes for an operator: each text is said once, and only so many of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

MAX_NOTES = 100


class Notes:
    """Says each different text once, at most `limit` of them, and then once that it stops.

    Clients decide what the texts name, so neither the output nor this object may grow with them.

    Args:
        say: writes one line.
        limit: different texts.
    """

    def __init__(self, say: Callable[[str], None], limit: int = MAX_NOTES) -> None:
        self._say = say
        self._limit = limit
        self._said: set[str] = set()

    def add(self, texts: Iterable[str], where: str = "") -> None:
        """Say what was not said before; `where` stands in front of it and does not make it another text."""
        for text in texts:
            if text in self._said or len(self._said) > self._limit:
                continue
            full = len(self._said) == self._limit
            self._said.add(text)
            self._say(f"{self._limit} different notes were written; no more follow" if full else where + text)
