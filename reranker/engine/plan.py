"""Which model fits which GPU in which precision: the sums that `load` decides by, without a GPU or weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from huggingface_hub import constants

from reranker.engine.checkpoint.locate import locate
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.families import open_checkpoint
from reranker.engine.families.official import OFFICIAL, Described, official
from reranker.engine.precision import FLOAT8
from reranker.engine.prompt import Prompt

_GIB = 1 << 30
CARDS = (8, 12, 16, 24, 48, 80)
"""Sizes of cards, in GB as they are sold."""
REPORTED = 0.92
"""GiB that a card reports for each GB: cards with error correction (T4 14.7 of 16, A10 22.1 of 24, L40S 44.4 of 48);
others report more."""
PRECISIONS = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, FLOAT8: torch.bfloat16,
              torch.int8: torch.bfloat16}  # fmt: skip
"""On a GPU, with what is between the products; float16 takes as much as bfloat16."""


def describe(name: str, revision: str | None = None) -> Described:
    """Describe a model by its folder, or by its hub name if it is an official one or in the hub's cache.

    Raises:
        ModelLoadError: it is neither, or it cannot be served.
    """
    short = name.removeprefix("Qwen/")
    if short in OFFICIAL and not os.path.isdir(os.path.expanduser(name)):
        return official(short)
    with _offline():
        family = open_checkpoint(locate(name, revision))
    checkpoint = family.checkpoint
    weights = Weights(checkpoint.path, checkpoint.adapter, checkpoint.scheme)
    prompt = Prompt(checkpoint.tokenizer, family.template)
    return Described(name, weights, family.widths, len(prompt.static_prefix))


def allowed(card: int, percentage: float) -> int:
    """Return the bytes that a process may take of a card of so many GB."""
    return int(card * REPORTED * _GIB * percentage / 100)


@contextmanager
def _offline() -> Iterator[None]:
    """Let the hub's client read its cache only: a plan must not download the weights."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
