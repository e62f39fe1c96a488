"""The real application around a scorer that keeps a journal and waits to be let go, for gunicorn.

JOURNAL   a file: a line "encode <query>" for each request that is tokenised, "pass <query> ..." for each forward pass
GATE      a named pipe: every forward pass waits for a byte from it; without it passes take FAKE_SECONDS
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from app import create_app
from config import load_settings
from reranker.types import EncodedRequest, RerankRequest, Slice
from tests.fake import FakeScorer


class Stepped(FakeScorer):
    """Queries are single words, so that the journal can name them."""

    def __init__(self) -> None:
        super().__init__(
            seconds=float(os.environ.get("FAKE_SECONDS", "0")),
            max_batch_tokens=int(os.environ.get("FAKE_BATCH_TOKENS", "1000")),
        )
        self.journal = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        gate = os.environ.get("GATE")
        # Open in both directions, so that it never ends when the test closes it.
        self.gate = os.open(gate, os.O_RDWR) if gate else None

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """As ever, and told."""
        encoded = super().encode(request)
        self._tell("encode", [request.query])
        return encoded

    def score(self, batch: list[Slice]) -> list[float]:
        """As ever, told, and when it is let go."""
        names = {i: word for word, i in list(self.words.items())}
        self._tell("pass", [names[part.request.prefix[0]] for part in batch])
        if self.gate is not None:
            os.read(self.gate, 1)
        return super().score(batch)

    def _tell(self, what: str, names: Sequence[str]) -> None:
        os.write(self.journal, " ".join([what, *names]).encode() + b"\n")


app = create_app(load_settings(), Stepped)
