"""The plain computation of the Qwen3-Reranker model card: the reference that every score is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PREFIX = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"


class Card:
    """The reference model. Written from the card's transformers sample: it shares no code with the engine.

    Args:
        path: a folder with a checkpoint.
        max_length: tokens of a prompt; a longer pair is truncated from the right.
        device: where to compute.
        dtype: precision of the weights.
    """

    def __init__(
        self, path: Path, *, max_length: int = 8192, device: str = "cpu", dtype: torch.dtype = torch.float32
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(path), padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
        self.model = model.to(device).eval()
        self.max_length = max_length
        self.yes = self.tokenizer.convert_tokens_to_ids("yes")
        self.no = self.tokenizer.convert_tokens_to_ids("no")
        self.prefix: list[int] = self.tokenizer.encode(PREFIX, add_special_tokens=False)
        self.suffix: list[int] = self.tokenizer.encode(SUFFIX, add_special_tokens=False)

    def ids(self, query: str, document: str, instruction: str = INSTRUCTION) -> list[int]:
        """Return the tokens of the whole prompt."""
        pair: list[int] = self.tokenizer.encode(
            f"<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}", add_special_tokens=False
        )
        return self.prefix + pair[: self.max_length - len(self.prefix) - len(self.suffix)] + self.suffix

    def logit(self, query: str, document: str, instruction: str = INSTRUCTION) -> float:
        """Return the logit of "yes" minus the logit of "no" at the last position."""
        return self.logit_of(self.ids(query, document, instruction))

    @torch.inference_mode()
    def logit_of(self, ids: list[int]) -> float:
        """The same for the tokens of a prompt."""
        last = self.model(input_ids=torch.tensor([ids], device=self.model.device)).logits[0, -1].float()
        return float(last[self.yes] - last[self.no])

    @torch.inference_mode()
    def logits(self, query: str, documents: list[str], *, batch: int, all_positions: bool = False) -> list[float]:
        """Return logits in document order, computed in batches padded on the left to the longest, as on the card.

        Args:
            query: the query.
            documents: the documents.
            batch: pairs in one forward pass.
            all_positions: compute the whole vocabulary at every position, as the card's sample does.
        """
        ids = [self.ids(query, document) for document in documents]
        logits: list[float] = []
        for start in range(0, len(ids), batch):
            group = self.tokenizer.pad({"input_ids": ids[start : start + batch]}, padding=True, return_tensors="pt")
            options = {} if all_positions else {"logits_to_keep": 1}
            last = self.model(**group.to(self.model.device), **options).logits[:, -1].float()
            logits += (last[:, self.yes] - last[:, self.no]).tolist()
        return logits
