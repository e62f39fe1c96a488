from __future__ import annotations

import random
from dataclasses import replace

from reranker.engine.budget import fit_documents, split, split_in_half
from reranker.types import EncodedRequest, Slice


def request(lengths: list[int], prefix: int = 5, kept: int = 0) -> EncodedRequest:
    return EncodedRequest([0] * prefix, [[1] * n for n in lengths], cached_prefix_len=kept)


def test_documents_fit_within_both_limits() -> None:
    r = request([10, 10, 10, 10])
    assert fit_documents(r, 0, 45, 9) == 4
    assert fit_documents(r, 0, 44, 9) == 3
    assert fit_documents(r, 0, 100, 2) == 2
    assert fit_documents(r, 3, 15, 9) == 4
    assert fit_documents(r, 3, 14, 9) == 3
    assert fit_documents(r, 0, 4, 9) == 0
    assert fit_documents(request([10, 10, 10, 10], prefix=65, kept=60), 0, 45, 9) == 4
    assert fit_documents(request([10, 10, 10, 10], prefix=65, kept=60), 0, 44, 9) == 3


def test_a_long_query_before_tiny_documents_gathers_a_bounded_number_of_keys() -> None:
    r = request([1] * 2000, prefix=8000)
    for kept in (0, 7999):
        for part in split(replace(r, cached_prefix_len=kept), 10_000, 9999):
            assert (part.stop - part.start) * 8001 <= 8 * 10_000


def test_split_covers_every_document_once_and_in_order() -> None:
    rng = random.Random(2)
    for _ in range(100):
        r = request([rng.randrange(1, 30) for _ in range(rng.randrange(1, 20))], kept=rng.randrange(5))
        most, documents = rng.randrange(10, 80), rng.randrange(1, 6)
        slices = split(r, most, documents)
        assert [d for s in slices for d in s.documents] == r.documents
        for s in slices:
            assert s.stop - s.start <= documents
            assert s.tokens <= most or s.stop - s.start == 1


def test_halves_are_the_same_documents() -> None:
    slices = [Slice(request([1, 2, 3]), 0, 3), Slice(request([4]), 0, 1), Slice(request([5, 6, 7]), 1, 3)]
    parts = split_in_half(slices)
    assert parts is not None
    left, right = parts
    assert [d for s in [*left, *right] for d in s.documents] == [d for s in slices for d in s.documents]
    assert sum(s.stop - s.start for s in left) == 3
    assert all(s.stop > s.start for s in [*left, *right])
    assert split_in_half([Slice(request([9]), 0, 1)]) is None
