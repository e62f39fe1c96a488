"""The plain computation of the Qwen3-Reranker model card, one pair at a time: what every score is held against."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Card:
    """The reference model. Written from the card, not from the engine: it shares no code with it."""

    def __init__(self, path: Path, max_length: int = 8192, dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(path))
        self.model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype).eval()
        self.max_length = max_length
        self.yes = self.tokenizer.convert_tokens_to_ids("yes")
        self.no = self.tokenizer.convert_tokens_to_ids("no")

    def ids(self, query: str, document: str, instruction: str = INSTRUCTION) -> list[int]:
        """The whole prompt, the pair cut from the right."""
        prefix = self.tokenizer.encode(PREFIX, add_special_tokens=False)
        suffix = self.tokenizer.encode(SUFFIX, add_special_tokens=False)
        pair = self.tokenizer.encode(
            f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}", add_special_tokens=False
        )
        ids: list[int] = prefix + pair[: self.max_length - len(prefix) - len(suffix)] + suffix
        return ids

    @torch.inference_mode()
    def logit(self, query: str, document: str, instruction: str = INSTRUCTION) -> float:
        """Logit of "yes" minus logit of "no" at the last position."""
        ids = torch.tensor([self.ids(query, document, instruction)], device=self.model.device)
        last = self.model(input_ids=ids).logits[0, -1].float()
        return float(last[self.yes] - last[self.no])
