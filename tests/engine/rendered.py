"""The plain computation of a checkpoint with its own prompt or head: the reference for everything but the card."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.escape import as_text


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

    def text(self, query: str, document: str, instruction: str | None = None) -> str:
        """Return the whole prompt."""
        if self.prompt is not None:
            return self.prompt.format(instruction=instruction, query=query, document=document)
        system = [{"role": "system", "content": instruction}] if instruction else []
        pair = [{"role": "query", "content": query}, {"role": "document", "content": document}]
        messages: list[dict[str, Any]] = [*system, *pair]
        if self.structured:
            for message in messages:
                message["content"] = [{"type": "text", "text": message["content"]}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **self.options))

    def ids(self, query: str, document: str, instruction: str | None = None) -> list[int]:
        """Return the tokens of the whole prompt."""
        return list(self.tokenizer.encode(self.text(query, document, instruction), add_special_tokens=False))

    def escaped(self, query: str, document: str, instruction: str | None = None, *, space: bool = True) -> list[int]:
        """Return the tokens of the prompt in which control tokens of the three texts are text.

        `space`: whether the space of the prompt before the document stays.
        """
        texts = {"\ue000": query, "\ue001": document, "\ue002": instruction or ""}
        prompt = self.text("\ue000", "\ue001", "\ue002" if instruction else None)
        if not space:
            prompt = prompt.replace(" \ue001", "\ue001")
        added = {str(token): i for i, token in self.tokenizer.added_tokens_decoder.items()}
        ids: list[int] = []
        for part in re.split(f"({'|'.join(map(re.escape, added))})", prompt):
            piece = part
            for mark, text in texts.items():
                piece = piece.replace(mark, text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
            ids += [added[part]] if part in added else as_text(self.tokenizer.backend_tokenizer, piece)
        return ids

    def logit(self, query: str, document: str, instruction: str | None = None) -> float:
        """Return logit(true) - logit(false), logit(true), or the label's logit at the last position."""
        return self.score(self.ids(query, document, instruction))

    @torch.inference_mode()
    def score(self, ids: list[int]) -> float:
        """Return the logit of the tokens of a prompt."""
        last = self.model(input_ids=torch.tensor([ids])).logits[0].double()
        if self.classifier:
            return float(last[-1] - last[0]) if len(last) == 2 else float(last[0])
        words = self.words or {name: self.tokenizer.convert_tokens_to_ids(w) for name, w in _WORDS.items()}
        true, false = words["true_token_id"], words["false_token_id"]
        return float(last[-1, true] - (0 if false is None else last[-1, false]))


_WORDS = {"true_token_id": "yes", "false_token_id": "no"}
