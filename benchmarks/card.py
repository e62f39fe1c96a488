"""The model card's own code, as a peer: one pair at a time, in padded batches, and as printed (all logits)."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.engine.card import INSTRUCTION, PREFIX, SUFFIX


class Card:
    """Computes what the transformers sample of the Qwen3-Reranker model card computes."""

    def __init__(self, path: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(str(path), padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, device_map={"": device}).eval()
        self.device = device
        self.yes = self.tokenizer.convert_tokens_to_ids("yes")
        self.no = self.tokenizer.convert_tokens_to_ids("no")
        self.prefix = self.tokenizer.encode(PREFIX, add_special_tokens=False)
        self.suffix = self.tokenizer.encode(SUFFIX, add_special_tokens=False)

    @torch.inference_mode()
    def logits(self, query: str, documents: list[str], *, batch: int, all_positions: bool = False) -> list[float]:
        """Logits (yes minus no) in document order.

        Args:
            query: the query.
            documents: the documents.
            batch: pairs in one forward pass, padded on the left to the longest, as the card does.
            all_positions: compute the whole vocabulary at every position, as the card's snippet is printed.
        """
        pairs = [f"<Instruct>: {INSTRUCTION}\n<Query>: {query}\n<Document>: {document}" for document in documents]
        ids = [self.prefix + self.tokenizer.encode(p, add_special_tokens=False) + self.suffix for p in pairs]
        scores: list[float] = []
        for start in range(0, len(ids), batch):
            group = self.tokenizer.pad({"input_ids": ids[start : start + batch]}, padding=True, return_tensors="pt")
            group = group.to(self.device)
            keep = {} if all_positions else {"logits_to_keep": 1}
            last = self.model(**group, **keep).logits[:, -1].float()
            scores += (last[:, self.yes] - last[:, self.no]).tolist()
        return scores
