"""The real application around a fake scorer, for gunicorn: `tests.fake_app:app`. The environment sets its times."""

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
    """A BaseException like that of the tokenizers library after a panic of its Rust code."""


class Losing(FakeScorer):
    """A scorer on the GPU visible to its worker; documents can lose the device, hang it for ever, or cause a bug."""

    broken = False

    @property
    def info(self) -> ModelInfo:
        """With the GPU as the device, if there is one."""
        return replace(super().info, device=os.environ.get("CUDA_VISIBLE_DEVICES", "cpu"))

    @property
    def memory(self) -> int:
        """The batch loop reads it after a pass, outside of its error handling."""
        if self.broken:
            raise OSError("a bug after a forward pass")
        return super().memory

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Panic if the query says so."""
        if "panic" in request.query:
            raise Panic("in the tokenizer")
        return super().encode(request)

    def score(self, batch: list[Slice]) -> list[float]:
        """Fail as a document says."""
        words = {word for s in batch for d in s.documents for word in self._words(d)}
        if "lost" in words:
            raise DeviceLostError("the device failed and the worker restarts; try again", retry_after=10)
        self.broken = "bug" in words
        if "hang" in words:
            threading.Event().wait()
        return super().score(batch)


def load() -> FakeScorer:
    """Load within FAKE_LOAD_SECONDS; hang or fail if FAKE_LOAD_HANGS or FAKE_LOAD_FAILS names a file."""
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
    """Block the event loop, as a bug would."""
    time.sleep(60)  # noqa: ASYNC251


@app.get("/garbage", include_in_schema=False)
async def garbage() -> int:
    """Count the objects freed only by the garbage collector since the start of the process."""
    gc.collect()
    return sum(generation["collected"] for generation in gc.get_stats())
