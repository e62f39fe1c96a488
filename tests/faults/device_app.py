"""The real application and scorer with the demo model, on a device that fails where a document says so, or is small."""

from __future__ import annotations

import os

import torch

from app import create_app, load_scorer
from config import load_settings
from reranker.engine.batch import PackedBatch
from reranker.engine.scorer import Scorer
from reranker.types import EncodedRequest, RerankRequest

ERRORS = {
    "a device-side assert": torch.AcceleratorError("CUDA error: device-side assert triggered"),
    "an unknown kernel": RuntimeError("no kernel image is available for execution on the device"),
}
NAN = "not a number"
_MEMORY = int(os.environ.get("DEVICE_TOKENS", str(1 << 30)))

settings = load_settings()


class Device:
    """The model, but a forward pass above DEVICE_TOKENS does not fit, and some documents make it fail."""

    def __init__(self, scorer: Scorer) -> None:
        self.model, self.encode = scorer.model, scorer.encode
        self.harmful: dict[tuple[int, ...], str] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self.model, name)

    def note(self, request: RerankRequest) -> EncodedRequest:
        """Encode, and record the tokens of harmful documents."""
        encoded = self.encode(request)
        for text, tokens in zip(request.documents, encoded.documents, strict=True):
            if text in ERRORS or text == NAN:
                self.harmful[tuple(tokens)] = text
        return encoded

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """The real forward pass, unless a document makes it fail."""
        if batch.tokens > _MEMORY:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {batch.tokens} tokens")
        said = [self.harmful.get(tuple(tokens)) for part in batch.slices for tokens in part.documents]
        for text in said:
            if text in ERRORS:
                raise ERRORS[text]
        return torch.where(torch.tensor([text == NAN for text in said]), torch.nan, self.model.forward(batch))


def load() -> Scorer:
    """The demo, on that device."""
    scorer = load_scorer(settings)
    assert isinstance(scorer, Scorer)
    device = Device(scorer)
    scorer.model = device  # type: ignore[assignment]
    scorer.encode = device.note  # type: ignore[method-assign]
    return scorer


app = create_app(settings, load)
