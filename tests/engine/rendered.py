"""The plain computation of a checkpoint with its own prompt or head: the reference for everything but the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


class Rendered:
    """One pair at a time: the chat template renders it, transformers computes it. Shares no code with the engine.

    Args:
        path: a folder with a checkpoint.
        prompt: `str.format` text with {instruction}, {query} and {document}; None: the folder's chat template.
        structured: whether the contents of messages are lists.
        options: of the chat template.
    """

    def __init__(self, path: Path, prompt: str | None = None, *, structured: bool = False, **options: Any) -> None:
        self.structured = structured
        self.tokenizer = AutoTokenizer.from_pretrained(str(path))
        self.prompt, self.options = prompt, options
        words = path / "1_LogitScore" / "config.json"
        self.words = json.loads(words.read_text()) if words.is_file() else None
        classifier = "SequenceClassification" in json.loads((path / "config.json").read_text())["architectures"][0]
        auto: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
        self.classifier = classifier
        self.model = auto.from_pretrained(str(path), dtype=torch.float32).eval()

    def ids(self, query: str, document: str, instruction: str | None = None) -> list[int]:
        """Return the tokens of the whole prompt."""
        if self.prompt is not None:
            text = self.prompt.format(instruction=instruction, query=query, document=document)
        else:
            system = [{"role": "system", "content": instruction}] if instruction else []
            pair = [{"role": "query", "content": query}, {"role": "document", "content": document}]
            messages: list[dict[str, Any]] = [*system, *pair]
            if self.structured:
                for message in messages:
                    message["content"] = [{"type": "text", "text": message["content"]}]
            text = str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options))
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    @torch.inference_mode()
    def logit(self, query: str, document: str, instruction: str | None = None) -> float:
        """Return logit(true) - logit(false), logit(true), or the label's logit at the last position."""
        ids = torch.tensor([self.ids(query, document, instruction)])
        last = self.model(input_ids=ids).logits[0].double()
        if self.classifier:
            return float(last[-1] - last[0]) if len(last) == 2 else float(last[0])
        words = self.words or {name: self.tokenizer.convert_tokens_to_ids(w) for name, w in _WORDS.items()}
        true, false = words["true_token_id"], words["false_token_id"]
        return float(last[-1, true] - (0 if false is None else last[-1, false]))


_WORDS = {"true_token_id": "yes", "false_token_id": "no"}
