"""The tokenizer for texts of requests: control tokens inside them stay text."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from reranker.engine.template import Template
from reranker.errors import ModelLoadError

logger = logging.getLogger(__name__)


def text_tokenizer(tokenizer: PreTrainedTokenizerBase, control_tokens: frozenset[str]) -> Tokenizer:
    """Return a copy that parses no control token; words that a fine-tune added stay in the vocabulary."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelLoadError("the model folder has no tokenizer.json: download the whole checkpoint again")
    description = json.loads(backend.to_str())
    tokens = description["added_tokens"]
    words = [token for token in tokens if token["content"] not in control_tokens and not token["special"]]
    control = {token["content"]: token["id"] for token in tokens if token not in words}
    if others := sorted(set(control) - control_tokens):
        logger.warning("special tokens of the checkpoint are plain text in queries and documents: %s", others[:3])
    description |= {"truncation": None, "padding": None}
    for token in tokens:
        token["special"] = token not in words  # `encode_special_tokens` makes special ones, and only those, text
    if not words:
        description["added_tokens"] = []
    model = description["model"]
    hidden = _hide_pieces(model, control) if model["type"] == "Unigram" else []
    copy = Tokenizer.from_str(json.dumps(description))
    copy.encode_special_tokens = True
    unknown = tokenizer.unk_token_id if model["type"] in ("WordPiece", "Unigram") else None  # any text may hold it
    texts = [(text, i) for text, i in [*control.items(), *hidden] if i != unknown]
    parsed = sorted(text for text, i in texts if i in copy.encode(text, add_special_tokens=False).ids)
    if parsed:
        raise ModelLoadError(f"control tokens are ordinary vocabulary here and could be forged: {parsed[:3]}")
    return copy


def _hide_pieces(model: dict[str, Any], control: Mapping[str, int]) -> list[tuple[str, int]]:
    """Rename the control tokens among the pieces of a Unigram model, which would find them inside a text.

    Returns:
        Their new names: with a space, which the pre-tokenizers of such models replace in every text.
    """
    places = [(text, i) for text, i in control.items() if i < len(model["vocab"]) and model["vocab"][i][0] == text]
    for text, i in places:
        model["vocab"][i][0] = f" {text}"
    return [(f" {text}", i) for text, i in places]


def control_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> dict[str, int]:
    """Return the ids of the template's own control tokens."""
    ids: dict[str, int] = {}
    for token in template.own_tokens:
        encoded = tokenizer.encode(token, add_special_tokens=False)
        if encoded != [tokenizer.convert_tokens_to_ids(token)]:
            raise ModelLoadError(f"the tokenizer has no token {token}: use the original checkpoint's tokenizer")
        ids[token] = encoded[0]
    return ids
