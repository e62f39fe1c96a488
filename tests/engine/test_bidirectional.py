"""Attention of pairs: against the plain computation of one pair, and on `meta` tensors for the calls of a GPU."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, BertConfig, ModernBertConfig, XLMRobertaConfig

from reranker.engine.acceleration import sample
from reranker.engine.attention import SdpaAttention, VarlenAttention
from reranker.engine.batch import PackedBatch, pack, pad
from reranker.engine.bidirectional import GroupedPairs, PairAttention, SdpaPairs, VarlenPairs, choose_pair_kernel
from reranker.engine.families.base import Head
from reranker.engine.families.bert import BertEncoder, XlmRobertaEncoder
from reranker.engine.families.encoder import Encoder
from reranker.engine.families.loader import Loader
from reranker.engine.families.modernbert import ModernBertEncoder
from reranker.engine.graphs import SIZES, bucket, fits
from reranker.engine.grouped import GroupedAttention
from reranker.engine.model import Model
from reranker.types import EncodedRequest, Slice

META = torch.device("meta")
HEADS, WIDTH = 3, 8


def batch_of(lengths: list[int], requests: int = 1) -> PackedBatch:
    documents = [[1] * length for length in lengths]
    shares = [documents[i::requests] for i in range(requests)]
    return pack([Slice(EncodedRequest([], share), 0, len(share)) for share in shares if share])


def plain(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """[n, H, D] of one pair"""
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if window is not None:
        places = torch.arange(len(q))
        scores.masked_fill_((places[:, None] - places).abs() > window, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)


@pytest.mark.parametrize("kernel", [SdpaPairs, GroupedPairs])
@pytest.mark.parametrize("window", [None, 0, 1, 5, 64, 200])
def test_each_pair_equals_the_plain_computation(window: int | None, kernel: type[PairAttention]) -> None:
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for round_ in range(6):
        lengths = [rng.choice([1, 2, 15, 16, 17, 65, 127, 128, 129, 260, rng.randrange(1, 300)]) for _ in range(7)]
        batch = batch_of(lengths if round_ else [300], requests=1 + round_ % 3)
        q, k, v = torch.randn(3, batch.tokens, HEADS, WIDTH, generator=generator).unbind()
        attention = kernel(batch, window)
        found, start = attention.attend_all(q, k, v, 0.3), 0
        firsts: list[Tensor] = []
        for length in batch.lengths_q[batch.prefixes :]:
            own = slice(start, start + length)
            expected = plain(q[own], k[own], v[own], 0.3, window)
            assert torch.allclose(found[own], expected, atol=2e-6)
            firsts.append(expected[0])
            start += length
        if window is None:
            first = batch.last - batch.position_ids[batch.last]
            assert torch.allclose(attention.attend_last(q[first], k, v, 0.3), torch.stack(firsts), atol=2e-6)


@pytest.mark.parametrize("kernel", [SdpaPairs, GroupedPairs])
def test_a_pair_does_not_depend_on_the_others(kernel: type[PairAttention]) -> None:
    generator = torch.Generator().manual_seed(2)
    q, k, v = torch.randn(3, 41, HEADS, WIDTH, generator=generator).unbind()
    alone = kernel(batch_of([41])).attend_all(q, k, v, 0.3)
    others = torch.randn(3, 90, HEADS, WIDTH, generator=generator).unbind()
    q, k, v = (torch.cat([own, other]) for own, other in zip((q, k, v), others, strict=True))
    assert torch.allclose(kernel(batch_of([41, 46, 44])).attend_all(q, k, v, 0.3)[:41], alone, atol=1e-6)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [(VarlenAttention, VarlenPairs), (GroupedAttention, GroupedPairs), (SdpaAttention, SdpaPairs)],
)
def test_the_kernel_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch, kernel: Any, expected: Any) -> None:
    monkeypatch.setattr(
        "reranker.engine.bidirectional.choose_kernel", lambda *args: (kernel, "calls (no varlen kernel)")
    )
    chosen, reason = choose_pair_kernel(META, torch.float32, 8)
    assert chosen is expected
    assert "no varlen kernel" in reason


SIZE: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_labels": 1}
MODERN: dict[str, Any] = SIZE | {"num_hidden_layers": 3, "local_attention": 16, "layer_types": None}
ENCODERS: dict[str, tuple[type[Encoder], Any]] = {
    "bert": (BertEncoder, BertConfig(**SIZE, num_hidden_layers=2)),
    "xlm-roberta": (XlmRobertaEncoder, XLMRobertaConfig(**SIZE, num_hidden_layers=2)),
    "modernbert": (ModernBertEncoder, ModernBertConfig(**MODERN)),
    "modernbert, mean": (ModernBertEncoder, ModernBertConfig(**MODERN, classifier_pooling="mean")),
}


@pytest.mark.parametrize("kernel", [VarlenPairs, GroupedPairs])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_gpu_takes_every_call(name: str, kernel: type[PairAttention]) -> None:
    """Also of a batch that is padded for a recorded pass; a size that depended on the data would be refused."""
    kind, config = ENCODERS[name]
    with META:
        stored = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).state_dict()
    weights: Any = SimpleNamespace(path=Path("meta"), tensor=lambda name: stored[name])
    backbone = kind(Loader(weights, META, torch.bfloat16, torch.bfloat16), config)
    if isinstance(backbone, BertEncoder) and name == "bert":
        backbone.separator = 3
    model = Model(backbone, Head(torch.empty(64, device=META), 0.5), META, torch.bfloat16, kernel)
    batch = batch_of([3, 40, 90], requests=2)
    shapes = [batch, pad(batch, bucket(batch.tokens))] if kernel is VarlenPairs else [batch]
    for packed in shapes:
        logits = model.forward(packed)
        assert (logits.device, logits.dtype, len(logits)) == (META, torch.float32, packed.shape.documents)


@pytest.mark.parametrize(("positions", "longest"), [(None, 128), (512, 128), (90, 90)])
def test_samples_of_pairs_fit_their_recordings(positions: int | None, longest: int) -> None:
    backbone = SimpleNamespace(causal=False, vocab_size=50, positions=positions)
    model: Any = SimpleNamespace(backbone=backbone, static_prefix=())
    for tokens in SIZES:
        for batch in (sample(tokens, model), sample(tokens - 16, model)):
            assert fits(batch, bucket(tokens))
            assert batch.shape.longest_q <= longest
        assert sample(tokens, model).tokens == tokens
