from __future__ import annotations

import random

import torch

from reranker.engine.batch import pack
from reranker.types import EncodedRequest, Slice

STATIC_PREFIX = 6


def request(rng: random.Random, prefix: int, lengths: list[int]) -> EncodedRequest:
    kept = rng.randrange(min(prefix, STATIC_PREFIX + 1))
    ids = [rng.randrange(99) for _ in range(prefix)]
    return EncodedRequest(ids, [[rng.randrange(99)] * n for n in lengths], cached_prefix_len=kept)


def test_every_segment_holds_its_tokens_positions_and_keys() -> None:
    rng = random.Random(1)
    for _ in range(50):
        slices = []
        for _ in range(rng.randrange(1, 5)):
            r = request(rng, rng.randrange(1, 9), [rng.randrange(1, 12) for _ in range(rng.randrange(1, 6))])
            start = rng.randrange(len(r.documents))
            slices.append(Slice(r, start, rng.randrange(start, len(r.documents)) + 1))
        batch = pack(slices, static_prefix_len=STATIC_PREFIX)
        cu_q, cu_k, cu_last = batch.cu_seqlens

        prefixes = [(s.request.prefix[s.request.cached_prefix_len :], i) for i, s in enumerate(slices)]
        documents = [(d, i) for i, s in enumerate(slices) for d in s.documents]
        at = key = 0
        starts = []
        for i, (ids, owner) in enumerate(prefixes + documents):
            starts.append(at)
            kept = slices[owner].request.cached_prefix_len
            before = [*range(kept)]  # keys; the tokens' begin behind those of the static prefix
            if i >= len(slices):
                first = STATIC_PREFIX + starts[owner]
                before += range(first, first + len(slices[owner].request.prefix) - kept)
            assert batch.input_ids[at : at + len(ids)].tolist() == ids
            assert batch.position_ids[at : at + len(ids)].tolist() == list(range(len(before), len(before) + len(ids)))
            expected = [*before, *range(STATIC_PREFIX + at, STATIC_PREFIX + at + len(ids))]
            assert batch.kv_index[key : key + len(expected)].tolist() == expected
            assert cu_q[i] == at
            assert cu_k[i] == key
            assert (batch.lengths_q[i], batch.lengths_k[i]) == (len(ids), len(expected))
            if i >= len(slices):
                assert batch.last[i - len(slices)] == at + len(ids) - 1
            at, key = at + len(ids), key + len(expected)
        assert batch.tokens == at == cu_q[-1] == sum(s.tokens for s in slices)
        assert cu_k[-1] == key
        assert batch.prefixes == len(slices)
        assert cu_last.tolist() == [0] * len(slices) + list(range(len(documents) + 1))
        assert cu_q.dtype == cu_k.dtype == cu_last.dtype == torch.int32


def test_requests_with_the_same_prefix_share_it() -> None:
    rng = random.Random(2)
    first, other = request(rng, 8, [3, 2]), request(rng, 8, [4])
    same = EncodedRequest([*first.prefix], [[5] * 6], cached_prefix_len=first.cached_prefix_len)
    batch = pack([Slice(first, 0, 2), Slice(other, 0, 1), Slice(same, 0, 1)], static_prefix_len=STATIC_PREFIX)
    alone = pack([Slice(same, 0, 1)], static_prefix_len=STATIC_PREFIX)
    own = len(first.prefix) - first.cached_prefix_len
    assert batch.prefixes == 2
    assert batch.tokens == own + len(other.prefix) - other.cached_prefix_len + 3 + 2 + 4 + 6
    assert batch.position_ids[-6:].tolist() == alone.position_ids[-6:].tolist()
    keys = batch.kv_index[-batch.lengths_k[-1] :].tolist()
    assert keys[: len(first.prefix)] == batch.kv_index[: len(first.prefix)].tolist()
    assert len(keys) == alone.lengths_k[-1]
