"""Qwen3-Reranker and its fine-tunes: the prompt of its model card; other rerankers on the Qwen3 decoder.

Source of the prompt: the transformers sample of the Qwen3-Reranker model card.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from reranker.engine.families.causal import CausalFamily
from reranker.engine.template import Slot, Template
from reranker.request.template import SUFFIX, SYSTEM

CONTROL_TOKENS = frozenset(
    "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
    "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>".split()
)
TEMPLATE = Template(
    instructed=(
        f"{SYSTEM}<Instruct>: ",
        Slot.INSTRUCTION,
        "\n<Query>: ",
        Slot.QUERY,
        "\n<Document>: ",
        Slot.DOCUMENT,
        SUFFIX,
    ),
    plain=None,
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    control_tokens=CONTROL_TOKENS,
)
_ZERANK = "<|im_start|>system\n\0<|im_end|>\n<|im_start|>user\n\0<|im_end|>\n<|im_start|>assistant\n"


class Qwen3(CausalFamily):
    """A Qwen3 decoder; the card's prompt and words unless the checkpoint has its own."""

    name = "Qwen3"
    control_tokens = CONTROL_TOKENS
    card = TEMPLATE
    divisors: ClassVar[Mapping[tuple[str, str], float]] = {(_ZERANK, "Yes"): 5.0}
    """zerank-2: its card says `(scores / 5).sigmoid()`."""
