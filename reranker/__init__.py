"""Reranking with Qwen3-Reranker. The library's interface is `from reranker import Scorer`.

`Scorer` is imported on first use: it imports torch, and the service must respond before torch is loaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from reranker.errors import ModelLoadError, RerankError
from reranker.types import RerankRequest

if TYPE_CHECKING:
    from reranker.engine.scorer import Scorer

__all__ = ["ModelLoadError", "RerankError", "RerankRequest", "Scorer", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name == "Scorer":
        from reranker.engine.scorer import Scorer

        return Scorer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
