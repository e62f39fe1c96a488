from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reranker.engine import attention, grouped
from reranker.engine.attention import Attention, SdpaAttention, VarlenAttention, choose_kernel, varlen_options
from reranker.engine.batch import PackedBatch, pack
from reranker.engine.grouped import GroupedAttention
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


SDPA = pytest.mark.parametrize("kernel", [SdpaAttention, GroupedAttention])


@SDPA
def test_scaled_dot_product_attention_equals_the_definition(kernel: type[Attention]) -> None:
    check_against_definition(kernel, "cpu", torch.float32, 1e-5)


@SDPA
def test_it_does_without_any_mask(kernel: type[Attention], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "MAX_MASKED_KEYS", 0)
    monkeypatch.setattr(grouped, "MAX_MASK", 0)
    check_against_definition(kernel, "cpu", torch.float32, 1e-5)


def test_documents_of_similar_lengths_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a T4 a call for each document and layer takes longer than its work: 57 us of the host's time at least."""
    calls: list[int] = []
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def counted(q: Tensor, *others: Tensor, **options: Any) -> Tensor:
        calls.append(len(q))
        return attend(q, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    rng = random.Random(5)
    batch = pack([Slice(EncodedRequest([1] * 80, [[1] * rng.randrange(20, 180) for _ in range(50)]), 0, 50)])
    q, k, v = (torch.randn(batch.tokens, heads, 32) for heads in (4, 2, 2))
    kernel = GroupedAttention(batch)
    kernel.attend_all(q, k, v, SCALE)
    kernel.attend_last(q[batch.last], k, v, SCALE)
    assert sum(calls) == 51 + 50
    assert len(calls) <= 10


@SDPA
def test_a_document_is_computed_alone_as_beside_others(kernel: type[Attention]) -> None:
    """Its calls depend on its own length: other documents change the rounding of a sum at most."""
    torch.manual_seed(6)
    documents = [[1] * length for length in (30, 64, 65, 130, 30)]
    together = pack([Slice(EncodedRequest([1] * 40, documents), 0, 5)])
    q, k, v = (torch.randn(together.tokens, heads, 32) for heads in (4, 2, 2))
    expected = kernel(together).attend_all(q, k, v, SCALE)
    starts = together.cu_seqlens[0].tolist()
    for i in range(5):
        alone = pack([Slice(EncodedRequest([1] * 40, documents[i : i + 1]), 0, 1)])
        rows = torch.tensor([*range(40), *range(starts[1 + i], starts[2 + i])])
        actual = kernel(alone).attend_all(q[rows], k[rows], v[rows], SCALE)
        torch.testing.assert_close(actual, expected[rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2), (8, 1)])
def test_blocks_of_queries_equal_the_definition(
    heads: int, groups: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of many blocks and of one query, prefixes longer and shorter than they; some longer than the limit."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(attention, "MAX_MASKED_KEYS", 400)
    rng = random.Random(threads)
    torch.manual_seed(threads)
    slices = []
    for prefix in (1, 33, 250):
        documents = [[1] * length for length in (rng.randrange(1, 400), 1, 33, rng.randrange(1, 100))]
        request = EncodedRequest([1] * prefix, documents, cached_prefix_len=min(prefix - 1, STATIC_PREFIX))
        slices.append(Slice(request, 0, len(documents)))
    batch = pack(slices, static_prefix_len=STATIC_PREFIX)
    q = torch.randn(batch.tokens, heads, 16)
    k, v = (torch.randn(STATIC_PREFIX + batch.tokens, groups, 16) for _ in range(2))
    kernel = SdpaAttention(batch)
    gathered = k[batch.kv_index], v[batch.kv_index]
    cu_q, cu_k, _ = batch.cu_seqlens
    expected = by_the_book(q, *gathered, cu_q, cu_k, max(batch.lengths_q), max(batch.lengths_k), scale=SCALE)
    for _ in range(2):  # as in two layers: the second finds the buffers of the first
        torch.testing.assert_close(kernel.attend_all(q, k, v, SCALE), expected, atol=1e-5, rtol=0)
    last = kernel.attend_last(q[batch.last], k, v, SCALE)
    torch.testing.assert_close(last, expected[batch.last], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("prefix", "documents"), [(80, [100, 500]), (1100, [60, 20, 60])])
def test_few_hidden_weights_are_computed(prefix: int, documents: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU kernel computes a call's rectangle of queries and keys, whatever its mask hides."""
    calls: list[int] = []
    attend: Callable[..., Tensor] = F.scaled_dot_product_attention

    def counted(q: Tensor, k: Tensor, *others: Tensor, **options: Any) -> Tensor:
        calls.append(q.shape[2] * k.shape[2])
        return attend(q, k, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    batch = pack([Slice(EncodedRequest([1] * prefix, [[1] * n for n in documents]), 0, len(documents))])
    q, k, v = (torch.randn(batch.tokens, heads, 16) for heads in (4, 2, 2))
    SdpaAttention(batch).attend_all(q, k, v, SCALE)
    if prefix > attention.MAX_MASKED_KEYS:
        assert calls.pop(0) == prefix * prefix  # one causal call, which the kernel itself shortens
    seen = [
        sum(keys - own for own in range(queries))
        for queries, keys in zip(batch.lengths_q, batch.lengths_k, strict=True)
    ]
    assert sum(calls) < 1.1 * sum(seen[1:] if prefix > attention.MAX_MASKED_KEYS else seen)


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
    check_against_definition(GroupedAttention, "cuda", torch.float32, 1e-4)


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


POSITIONAL = "query key value cu_seq_q cu_seq_k max_q max_k"
SIGNATURES = {
    "2.10": (f"{POSITIONAL} is_causal return_aux", ""),
    "2.11": (POSITIONAL, "return_aux scale window_size"),
    "2.12": (POSITIONAL, "return_aux scale window_size enable_gqa seqused_k block_table num_splits"),
    "2.13": (POSITIONAL, "return_aux scale window_size enable_gqa seqused_k block_table num_splits"),
}
"""Of `varlen_attn` in torch's releases: positional arguments and keywords, read from their wheels."""


def signature(version: str) -> inspect.Signature:
    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    required = POSITIONAL.split()
    return inspect.Signature(
        [
            inspect.Parameter(name, kind, default=inspect.Parameter.empty if name in required else None)
            for kind, names in zip(kinds, SIGNATURES[version], strict=True)
            for name in names.split()
        ]
    )


@pytest.mark.parametrize("version", ["2.11", "2.12", "2.13"])
def test_the_kernel_is_called_with_the_signature_of_every_torch(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    released = signature(version)
    seen: list[dict[str, Any]] = []

    def varlen_attn(*args: Any, **options: Any) -> Tensor:
        seen.append(released.bind(*args, **options).arguments)
        return by_the_book(*args, **options)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_OPTIONS", varlen_options(released.parameters))
    check_against_definition(VarlenAttention, "cpu", torch.float32, 1e-5)
    assert all(call["window_size"] == (-1, 0) and call["scale"] == SCALE for call in seen)
    assert all(call.get("enable_gqa", True) for call in seen)
    assert ("num_splits" in seen[0]) == ("num_splits" in released.parameters)


def test_a_torch_without_these_options_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert varlen_options(signature("2.10").parameters) is None
    monkeypatch.setattr(attention, "_OPTIONS", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel, reason = choose_kernel(torch.device("cuda"), torch.bfloat16, 128)
    assert kernel is GroupedAttention
    assert "older than 2.11" in reason


def test_the_installed_torch_has_the_recorded_signature() -> None:
    assert attention.varlen_attn is not None
    installed = inspect.signature(attention.varlen_attn)
    version = ".".join(torch.__version__.split(".")[:2])
    assert [*installed.parameters] == [*signature(version).parameters]


def test_the_choice_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernel(torch.device("cpu"), torch.float32, 128)[0] is SdpaAttention
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_kernel(torch.device("cuda"), torch.bfloat16, 128) == (
        VarlenAttention,
        "varlen_attn (one call per layer)",
    )
    for dtype, head_dim, why in ((torch.float32, 128, "16-bit"), (torch.float16, 12, "not 12")):
        kernel, reason = choose_kernel(torch.device("cuda"), dtype, head_dim)
        assert kernel is GroupedAttention
        assert why in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_kernel(torch.device("cuda"), torch.float16, 128)[0] is GroupedAttention
