"""The real application around a fake scorer, for gunicorn: `tests.fake_app:app`. Times come from the environment."""

from __future__ import annotations

import os
import time

from app import create_app
from config import load_settings
from reranker.errors import DeviceLostError
from reranker.types import Slice
from tests.fake import FakeScorer


class Losing(FakeScorer):
    """Its device is lost when a document says so."""

    def score(self, batch: list[Slice]) -> list[float]:
        """As ever, unless."""
        if any("lost" in self._words(d) for s in batch for d in s.documents):
            raise DeviceLostError("the device failed and the worker restarts; try again", retry_after=10)
        return super().score(batch)


def load() -> FakeScorer:
    """Slow, failing or quick, as the test wants it."""
    time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")))
    return Losing(
        seconds=float(os.environ.get("FAKE_SECONDS", "0")),
        max_batch_tokens=int(os.environ.get("FAKE_BATCH_TOKENS", "1000")),
    )


app = create_app(load_settings(), load)
