"""The real application around a fake scorer, for gunicorn: `tests.fake_app:app`. Times come from the environment."""

from __future__ import annotations

import gc
import os
import threading
import time
from dataclasses import replace
from pathlib import Path

from app import create_app
from config import load_settings
from reranker.errors import DeviceLostError, ModelLoadError
from reranker.types import EncodedRequest, ModelInfo, RerankRequest, Slice
from tests.fake import FakeScorer


class Panic(BaseException):
    """What the tokenizers library raises where its Rust code panics is no Exception."""


class Losing(FakeScorer):
    """Its device is the GPU that its worker may see; it is lost, or hangs for ever, when a document says so."""

    broken = False

    @property
    def info(self) -> ModelInfo:
        """Named after the GPU, if there is any."""
        return replace(super().info, device=os.environ.get("CUDA_VISIBLE_DEVICES", "cpu"))

    @property
    def memory(self) -> int:
        """Read by the batch loop itself, behind a pass: outside of all that is expected to fail."""
        if self.broken:
            raise OSError("a bug behind a forward pass")
        return super().memory

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """As ever, unless."""
        if "panic" in request.query:
            raise Panic("in the tokenizer")
        return super().encode(request)

    def score(self, batch: list[Slice]) -> list[float]:
        """As ever, unless."""
        said = {word for s in batch for d in s.documents for word in self._words(d)}
        if "lost" in said:
            raise DeviceLostError("the device failed and the worker restarts; try again", retry_after=10)
        self.broken = "bug" in said
        if "hang" in said:
            threading.Event().wait()
        return super().score(batch)


def load() -> FakeScorer:
    """Slow, failing or quick, as the test wants it."""
    if Path(os.environ.get("FAKE_LOAD_HANGS", "none")).exists():
        threading.Event().wait()
    time.sleep(float(os.environ.get("FAKE_LOAD_SECONDS", "0")))
    if Path(os.environ.get("FAKE_LOAD_FAILS", "none")).exists():
        raise ModelLoadError("the test wants it so")
    return Losing(
        seconds=float(os.environ.get("FAKE_SECONDS", "0")),
        max_batch_tokens=int(os.environ.get("FAKE_BATCH_TOKENS", "1000")),
    )


app = create_app(load_settings(), load)


@app.get("/block", include_in_schema=False)
async def block() -> None:
    """Hold the event loop up, as a bug would."""
    time.sleep(60)  # noqa: ASYNC251


@app.get("/garbage", include_in_schema=False)
async def garbage() -> int:
    """Objects that only the garbage collector could free, since the process began."""
    gc.collect()
    return sum(generation["collected"] for generation in gc.get_stats())
