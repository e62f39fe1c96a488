"""Qwen3-Reranker: its prompt, its answer tokens and its head, on the decoder of decoder.py.

Source of the prompt: the transformers sample of the Qwen3-Reranker model card. The card tokenises `<Instruct>...
<Document>: {text}` in one piece; the Qwen pre-tokenizer never merges the `:` of `<Document>:` with the space after it,
so the piece can be split there without changing a token (tests/engine/test_prompt.py proves it on random text).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from reranker.engine.checkpoint.config import Checkpoint, check_numbers, check_rope
from reranker.engine.checkpoint.files import refuse_if
from reranker.engine.checkpoint.weights import HEAD, Weights
from reranker.engine.families.base import Backbone, Family, Head, Template, Wrap
from reranker.engine.families.decoder import Decoder
from reranker.errors import ModelLoadError
from reranker.request.template import SUFFIX, SYSTEM

TEMPLATE = Template(
    system=SYSTEM,
    opening="<Instruct>: {instruction}\n<Query>:",
    closing="\n<Document>:",
    suffix=SUFFIX,
    instruction="Given a web search query, retrieve relevant passages that answer the query",
    control_tokens=frozenset(
        "<|endoftext|> <|im_start|> <|im_end|> <|object_ref_start|> <|object_ref_end|> <|box_start|> <|box_end|> "
        "<|quad_start|> <|quad_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
        "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
        "<tool_response> </tool_response> <think> </think>".split()
    ),
)
_COMPUTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "use_sliding_window": (False, None),
    "is_causal": (True, None),
    "use_bidirectional_attention": (False, None),
}
"""Fields that change the computation, with the values that are computed here. Null counts as absent."""


def answer_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of "yes" and "no".

    Raises:
        ModelLoadError: the tokenizer lacks one.
    """
    ids: list[int] = []
    for word in ("yes", "no"):
        token = tokenizer.convert_tokens_to_ids(word)  # as on the card: the entry need not be one that begins a text
        if not isinstance(token, int) or token == tokenizer.unk_token_id:
            raise ModelLoadError(f"the tokenizer has no token {word!r}: not a Qwen3-Reranker checkpoint")
        ids.append(token)
    return ids


class Qwen3(Family):
    """A `Qwen3ForCausalLM` that answers yes or no."""

    template = TEMPLATE
    auto_class = AutoModelForCausalLM

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__(checkpoint)
        self.answers = dict(zip(("yes", "no"), answer_tokens(checkpoint.tokenizer), strict=True))

    @staticmethod
    def check_settings(file: Path, settings: dict[str, Any]) -> None:
        """See `Family.check_settings`."""
        for field, values in _COMPUTED.items():
            value = settings.get(field)
            refuse_if(
                value not in values, f"{file} has {field}={value!r}: Qwen3-Reranker is computed with {values[0]!r}"
            )
        check_rope(file, settings)
        check_numbers(file, settings, "rms_norm_eps", "rope_theta")

    def head(self, weights: Weights) -> Head:
        """Return W[yes] - W[no]: the card's softmax over the two logits is the sigmoid of their difference."""
        yes, no = weights.tensor(HEAD)[list(self.answers.values())].float()
        weight = yes - no
        equal = f"lm_head in {self.checkpoint.path} has equal rows for yes and no, so that every score would be 0.5"
        refuse_if(not weight.any(), f"{equal}: it was not saved")
        return Head(weight)

    def backbone(
        self,
        weights: Weights,
        device: torch.device,
        stored_dtype: torch.dtype,
        compute_dtype: torch.dtype,
        wrap: Wrap,
    ) -> Backbone:
        """See `Family.backbone`; of an output matrix of its own (8B: 1.2 GB) only the rows of the head are read."""
        return Decoder(weights, self.checkpoint.config, device, stored_dtype, compute_dtype, wrap)
