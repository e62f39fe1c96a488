"""Fixtures that several modules of this folder share."""

from __future__ import annotations

import pytest

from tests.conftest import Server, Start


@pytest.fixture(scope="module")
def short(start: Start) -> Server:
    """The demo model with a short context, so that texts are truncated, and a cache that remembers truncations."""
    return start(MAX_SEQ_LENGTH="160", MODEL_DEVICE="cpu", SCORE_CACHE_ENTRIES="100")
