"""`batch`: many rows in, JSON lines out."""

from reranker.batch.local import batch

__all__ = ["batch"]
