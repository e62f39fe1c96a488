"""Rerankers on the Qwen2 decoder, such as mxbai-rerank-v2: each checkpoint brings its prompt and its words."""

from __future__ import annotations

from reranker.engine.families.causal import CausalFamily
from reranker.engine.families.qwen3 import CONTROL_TOKENS


class Qwen2(CausalFamily):
    """A Qwen2 model with the sentence-transformers layout."""

    name = "Qwen2"
    control_tokens = CONTROL_TOKENS
