"""Logits of the engine and of the reference libraries for the same texts."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import CrossEncoder

from reranker import Scorer
from reranker.engine.budget import split
from reranker.types import RerankRequest

TOLERANCE = 1e-5
"""Of a logit in float32."""
WORDS = (
    "gzip compresses a file; the file's name ends in .gz 北京 今天 下雨 。天气 很好 ？ 12.5 % of C++ code (see "
    "a.b/c?d=1) naïve Ünïcode 😀 e\u0301 tab\there new\nline <b>bold</b> {{ braces }} {% raw %} and \\n no escape"
).split(" ")


def text(words: int, seed: int) -> str:
    """Return `words` random words."""
    return " ".join(random.Random(seed).choices(WORDS, k=words))


QUERIES = {
    "a question": "how do I compress a file?",
    "Chinese": "北京今天的天气怎么样",
    "a letter": "a",
    "white space around": "\n two lines\nand white space \n",
    "60 words": text(60, seed=1),
}
DOCUMENTS = [
    "To compress a file, use gzip.",
    "北京今天多云，最高气温二十度。",
    "x",
    "\n\n starts and ends with white space. \n\n",
    "   ",
    *(text(words, seed=words) for words in (1, 2, 3, 5, 8, 30, 120, 300)),
]
INSTRUCTIONS = {
    "a sentence": "Given a question, find the answer in a manual.",
    "Chinese": "查找相关的文章\n",
    "40 words": text(40, seed=2),
}


class Engine:
    """The engine with a loaded folder."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.scorer = Scorer.load(folder, device="cpu", precision="float32", max_batch_tokens=4096, **settings)

    def logits(self, query: str, documents: Sequence[str], instruction: str | None = None) -> list[float]:
        """Return a logit for each document, in order."""
        request = self.scorer.encode(RerankRequest(query, documents, instruction))
        parts = split(request, self.scorer.max_batch_tokens, self.scorer.max_batch_documents)
        return [logit for part in parts for logit in self.scorer.score(self.scorer.pack([part]))]


def load(folder: Path, **options: Any) -> CrossEncoder:
    """Load a folder with sentence-transformers; `options` are those of its tokenizer."""
    return CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32}, processor_kwargs=options)


def predict(model: CrossEncoder, query: str, documents: Sequence[str], prompt: str | None = None) -> list[Any]:
    """Return sentence-transformers' logits of one pair at a time, for padding changes them by up to 1e-5.

    `prompt`: the instruction; None: the folder's own.
    """
    pairs = [(query, document) for document in documents]
    scores = model.predict(pairs, prompt=prompt, batch_size=1, activation_fn=torch.nn.Identity())
    values: list[Any] = scores.tolist()
    return values


def assert_equal(ours: Sequence[float], reference: Sequence[float]) -> None:
    """Compare logits; the reference's must differ between documents, or the comparison would show nothing."""
    assert max(reference) - min(reference) > 0.1
    worst = max(range(len(reference)), key=lambda i: abs(ours[i] - reference[i]))
    assert len(ours) == len(reference)
    assert abs(ours[worst] - reference[worst]) < TOLERANCE, f"document {worst}: {ours[worst]}, not {reference[worst]}"
