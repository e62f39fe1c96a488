"""How requests are cut to the token budget of a forward pass: always between documents. Pure, and free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from reranker.types import EncodedRequest, Slice

# Attention gathers the prefix's keys for every document anew. So many gathered keys for each token of the budget is
# several times what usual requests need; a query of thousands of tokens before as many tiny documents would take
# gigabytes without it.
_KEYS_PER_TOKEN = 8


def fit(request: EncodedRequest, start: int, max_tokens: int, max_documents: int) -> int:
    """Where a slice of `request` from document `start` must stop to stay within both limits (`start`: none fits)."""
    prefix = len(request.prefix)
    left, keys = max_tokens - prefix + request.cached_prefix_len, max_tokens * _KEYS_PER_TOKEN
    stop = start
    for tokens in map(len, request.documents[start : start + max_documents]):
        left -= tokens
        keys -= prefix + tokens
        if left < 0 or keys < 0:
            break
        stop += 1
    return stop


def split(request: EncodedRequest, max_tokens: int, max_documents: int) -> list[Slice]:
    """The whole request in slices within both limits; a document above `max_tokens` gets a slice of its own."""
    slices: list[Slice] = []
    start = 0
    while start < len(request.documents):
        stop = max(fit(request, start, max_tokens, max_documents), start + 1)
        slices.append(Slice(request, start, stop))
        start = stop
    return slices


def fill(requests: Iterable[EncodedRequest], limits: Callable[[], tuple[int, int]]) -> Iterator[list[Slice]]:
    """A stream of requests as full batches, in order; a request at a batch's end is cut, as in `split`.

    Args:
        requests: read only as far as the next batch needs it.
        limits: the most tokens and documents of a batch, asked anew for each.
    """
    batch: list[Slice] = []
    tokens, documents = limits()
    for request in requests:
        start = 0
        while start < len(request.documents):
            stop = fit(request, start, tokens, max(0, documents))
            if stop == start and batch:
                yield batch
                batch = []
                tokens, documents = limits()
                continue
            batch.append(Slice(request, start, max(stop, start + 1)))
            tokens -= batch[-1].tokens
            documents -= batch[-1].stop - start
            start = batch[-1].stop
    if batch:
        yield batch


def split_in_half(slices: Sequence[Slice]) -> tuple[list[Slice], list[Slice]] | None:
    """The same documents in two parts of about the same count, or None when there is only one document."""
    documents = sum(s.stop - s.start for s in slices)
    if documents < 2:
        return None
    left: list[Slice] = []
    right: list[Slice] = []
    room = documents // 2
    for s in slices:
        middle = min(s.stop, s.start + room)
        if middle > s.start:
            left.append(replace(s, stop=middle))
        if middle < s.stop:
            right.append(replace(s, start=middle))
        room -= middle - s.start
    return left, right
