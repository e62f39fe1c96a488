"""The origin of scores: a running service, or a model in this process."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from reranker.rankers.ranker import Ranker
from reranker.settings import ModelSettings
from reranker.terminal import loading


@dataclass(frozen=True, slots=True)
class Source:
    """A service if `url` is set, else a model in this process."""

    url: str | None = None
    token: str | None = None
    model: ModelSettings = field(default_factory=ModelSettings)
    connections: int | None = None
    """Max requests in flight to the service; None: the client's default. It changes no score."""

    @property
    def identity(self) -> dict[str, Any]:
        """The values that change scores; an interrupted batch continues only with the same ones."""
        if self.url:
            return {"url": self.url}
        model = self.model.resolved()
        return {
            "model": model.model_name_or_path or None,
            "revision": model.model_revision or None,
            "precision": model.model_precision,
            "max_seq_length": model.max_seq_length,
            "instruction": model.default_instruction or None,
        }


def open_ranker(source: Source) -> Ranker:
    """Load the model, or connect to the service.

    Raises:
        ModelLoadError: the model cannot be served.
        FailedError: the service does not respond.
    """
    if source.url:
        from reranker.rankers.client import CONNECTIONS, Client

        return Client(source.url, source.token, connections=source.connections or CONNECTIONS)
    name = source.model.model_name_or_path
    # A download draws progress bars of its own.
    with loading(f"{name or 'demo'} ({source.model.model_device})", quiet=bool(name) and not os.path.isdir(name)):
        from reranker.rankers.local import Local

        return Local(source.model)
