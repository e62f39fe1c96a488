from __future__ import annotations

import random

import torch

from reranker.engine.packing import pack
from reranker.types import EncodedRequest, Slice


def request(rng: random.Random, prefix: int, lengths: list[int]) -> EncodedRequest:
    return EncodedRequest([rng.randrange(99) for _ in range(prefix)], [[rng.randrange(99)] * n for n in lengths])


def test_every_segment_holds_its_tokens_positions_and_keys() -> None:
    rng = random.Random(1)
    for _ in range(50):
        slices = []
        for _ in range(rng.randrange(1, 5)):
            r = request(rng, rng.randrange(1, 9), [rng.randrange(1, 12) for _ in range(rng.randrange(1, 6))])
            start = rng.randrange(len(r.documents))
            slices.append(Slice(r, start, rng.randrange(start, len(r.documents)) + 1))
        batch = pack(slices)
        cu_q, cu_k, cu_last = batch.cu_seqlens

        prefixes = [(s.request.prefix, 0) for s in slices]
        documents = [(d, len(s.request.prefix)) for s in slices for d in s.documents]
        owners = [i for i, s in enumerate(slices) for _ in s.documents]
        at = key = 0
        starts = []
        for i, (ids, shared) in enumerate(prefixes + documents):
            starts.append(at)
            assert batch.input_ids[at : at + len(ids)].tolist() == ids
            assert batch.position_ids[at : at + len(ids)].tolist() == list(range(shared, shared + len(ids)))
            owner = starts[owners[i - len(slices)]] if i >= len(slices) else 0
            expected = [*range(owner, owner + shared), *range(at, at + len(ids))]
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
