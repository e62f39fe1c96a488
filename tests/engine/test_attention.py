from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from reranker.engine import attention
from reranker.engine.attention import Attention, SdpaAttention, VarlenAttention, choose_kernel
from reranker.engine.batch import PackedBatch, pack
from reranker.types import EncodedRequest, Slice

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
SCALE = 0.3
STATIC_PREFIX = 25


def batch_of(rng: random.Random) -> PackedBatch:
    """Prefixes longer and shorter than their documents, for both branches of the kernel; some are cached."""
    slices = []
    for _ in range(rng.randrange(1, 4)):
        documents = [[1] * rng.randrange(1, 60) for _ in range(rng.randrange(1, 5))]
        prefix = rng.randrange(1, 40)
        request = EncodedRequest(
            [1] * prefix, documents, cached_prefix_len=rng.choice((0, min(prefix - 1, STATIC_PREFIX)))
        )
        slices.append(Slice(request, 0, len(documents)))
    return pack(slices, static_prefix_len=STATIC_PREFIX)


def plain(q: Tensor, k: Tensor, v: Tensor, batch: PackedBatch) -> Tensor:
    """Attention from its definition, one query at a time in float64."""
    q, k, v = q.double().cpu(), k.double().cpu(), v.double().cpu()
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q)
    cu_q, cu_k = batch.cu_seqlens[0].tolist(), batch.cu_seqlens[1].tolist()
    for s in range(len(cu_q) - 1):
        keys = batch.kv_index[cu_k[s] : cu_k[s + 1]].cpu()
        for i in range(cu_q[s], cu_q[s + 1]):
            seen = keys[: len(keys) - (cu_q[s + 1] - 1 - i)]
            for h in range(q.shape[1]):
                weights = torch.softmax(k[seen, h // group] @ q[i, h] * SCALE, 0)
                out[i, h] = weights @ v[seen, h // group]
    return out


def check_against_definition(kernel: type[Attention], device: str, dtype: torch.dtype, tolerance: float) -> None:
    rng = random.Random(3)
    torch.manual_seed(3)
    for _ in range(12):
        batch = batch_of(rng)
        rows = (batch.tokens, 4), (STATIC_PREFIX + batch.tokens, 2), (STATIC_PREFIX + batch.tokens, 2)
        q, k, v = (torch.randn(*shape, 64).to(device, dtype) for shape in rows)
        expected = plain(q, k, v, batch)
        moved = batch.to(torch.device(device))
        actual = kernel(moved)
        torch.testing.assert_close(actual.attend_all(q, k, v, SCALE).double().cpu(), expected, atol=tolerance, rtol=0)
        last = actual.attend_last(q[moved.last], k, v, SCALE).double().cpu()
        torch.testing.assert_close(last, expected[batch.last], atol=tolerance, rtol=0)


def test_segment_wise_attention_equals_the_definition() -> None:
    check_against_definition(SdpaAttention, "cpu", torch.float32, 1e-5)


def test_segment_wise_attention_without_any_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_MAX_MASK", 0)
    check_against_definition(SdpaAttention, "cpu", torch.float32, 1e-5)


def test_segment_wise_attention_in_bfloat16() -> None:
    check_against_definition(SdpaAttention, "cpu", torch.bfloat16, 2e-2)


@pytest.mark.cuda
@CUDA
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_attention_equals_the_definition(dtype: torch.dtype) -> None:
    check_against_definition(VarlenAttention, "cuda", dtype, 2e-2)


@pytest.mark.cuda
@CUDA
def test_segment_wise_attention_on_cuda() -> None:
    check_against_definition(SdpaAttention, "cuda", torch.float32, 1e-4)


def by_the_book(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    **_: object,
) -> Tensor:
    """A stand-in for the kernel on the CPU, which follows the kernel's documentation."""
    assert (cu_q.dtype, cu_k.dtype) == (torch.int32, torch.int32)
    assert max_q >= int(cu_q.diff().max())
    assert max_k >= int(cu_k.diff().max())
    assert int(cu_q[-1]) == len(q)
    assert int(cu_k[-1]) <= len(k)  # a padded batch gathers keys that no segment reads
    out = torch.empty_like(q)
    for s in range(len(cu_q) - 1):
        qs, ks, vs = q[cu_q[s] : cu_q[s + 1]], k[cu_k[s] : cu_k[s + 1]], v[cu_k[s] : cu_k[s + 1]]
        ks, vs = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (ks, vs))
        weights = torch.einsum("qhd,khd->hqk", qs, ks) * scale
        hidden = torch.ones(len(qs), len(ks), dtype=torch.bool).triu(len(ks) - len(qs) + 1)
        weights = weights.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num()  # a query without keys gets zeros
        out[cu_q[s] : cu_q[s + 1]] = torch.einsum("hqk,khd->qhd", weights, vs)
    return out


def test_varlen_is_called_with_what_the_kernel_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    """cu_seq and bottom-right causal attention, checked by a stand-in on the CPU."""
    monkeypatch.setattr(attention, "varlen_attn", by_the_book)
    check_against_definition(VarlenAttention, "cpu", torch.float32, 1e-5)


def test_the_installed_torch_accepts_the_options() -> None:
    import inspect

    assert attention.varlen_attn is not None
    assert set(attention._OPTIONS) <= set(inspect.signature(attention.varlen_attn).parameters)
    assert attention._OPTIONS.get("window_size") == (-1, 0)


def test_the_choice_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel(torch.device("cpu"), torch.float32)[0] is SdpaAttention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_kernel(torch.device("cuda"), torch.bfloat16) == (VarlenAttention, "varlen_attn (one call per layer)")
    kernel, reason = choose_kernel(torch.device("cuda"), torch.float32)
    assert kernel is SdpaAttention
    assert "16-bit" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_kernel(torch.device("cuda"), torch.float16)[0] is SdpaAttention
