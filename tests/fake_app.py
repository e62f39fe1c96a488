"""The real application around a fake scorer, for gunicorn: `tests.fake_app:app`. Times come from the environment."""

from __future__ import annotations

import os
import time

from app import create_app
from config import load_settings
from tests.fake import FakeScorer


def load() -> FakeScorer:
    """Slow, failing or quick, as the test wants it."""
    time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")))
    return FakeScorer(
        seconds=float(os.environ.get("FAKE_SECONDS", "0")),
        max_batch_tokens=int(os.environ.get("FAKE_BATCH_TOKENS", "1000")),
    )


app = create_app(load_settings(), load)
