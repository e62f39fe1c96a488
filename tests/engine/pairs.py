"""The plain computation of an encoder: the tokenizer's own pair, transformers, one pair at a time, no padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Pairs:
    """Tokens and logits of pairs. Shares no code with the engine.

    Args:
        path: a folder with a checkpoint.
        changes: fields of config.json that differ from the folder's.
    """

    def __init__(self, path: Path, **changes: Any) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(path))
        auto: Any = AutoModelForSequenceClassification
        self.model = auto.from_pretrained(str(path), dtype=torch.float32, **changes).eval()
        self.text_tokenizer = _without_control_tokens(self.tokenizer)
        self.token_types = self.model.config.model_type == "bert"
        """Whether the document's tokens are of another type than the query's."""
        self.cls, self.sep = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id
        self.separators = [self.sep] * (2 if self.model.config.model_type == "xlm-roberta" else 1)

    def plain(self, query: str, document: str, length: int | None = None) -> list[int]:
        """Return the tokenizer's own pair, its document truncated by the tokenizer to a pair of `length` tokens.

        As a batch of one: without a list transformers takes an empty document for a missing one.
        """
        options: dict[str, Any] = {} if length is None else {"truncation": "only_second", "max_length": length}
        [ids] = self.tokenizer([query], [document], **options)["input_ids"]
        return list(ids)

    def text(self, text: str) -> list[int]:
        """Return the tokens of a text in which control tokens are text."""
        printable = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return list(self.text_tokenizer.encode(printable, add_special_tokens=False).ids)

    def join(self, query: Sequence[int], document: Sequence[int]) -> list[int]:
        """Return the pair of two texts' tokens."""
        return [self.cls, *query, *self.separators, *document, self.sep]

    def ids(self, query: str, document: str, limit: int | None = None) -> list[int]:
        """Return the pair in which control tokens of the texts are text; `limit`: tokens of the document."""
        return self.join(self.text(query), self.text(document)[:limit])

    def logit(self, query: str, document: str, limit: int | None = None) -> float:
        """Return the logit of one label, or the second minus the first, of the pair of `ids`."""
        return self.score(self.ids(query, document, limit))

    def score(self, ids: Sequence[int]) -> float:
        """Return the logit of the tokens of a pair."""
        labels = self.labels(ids)
        return float(labels[1] - labels[0]) if len(labels) == 2 else float(labels[0])

    @torch.inference_mode()
    def labels(self, ids: Sequence[int]) -> Tensor:
        """Return the logits of all labels, float64."""
        inputs: dict[str, Any] = {"input_ids": torch.tensor([ids])}
        if self.token_types:
            first = ids.index(self.sep) + 1
            inputs["token_type_ids"] = torch.tensor([[0] * first + [1] * (len(ids) - first)])
        logits: Tensor = self.model(**inputs).logits[0]
        return logits.double()


def _without_control_tokens(tokenizer: Any) -> Tokenizer:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    special = {token["content"]: token["id"] for token in description["added_tokens"] if token["special"]}
    description |= {"truncation": None, "padding": None}
    description["added_tokens"] = [token for token in description["added_tokens"] if not token["special"]]
    if description["model"]["type"] == "Unigram":
        # They are pieces of the vocabulary here, which the model itself would find in a text.
        for i in special.values():
            description["model"]["vocab"][i][0] = f"\U0010f000{i}"
    return Tokenizer.from_str(json.dumps(description))
