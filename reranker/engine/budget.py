"""Split requests to the token budget of a forward pass, always between documents. Pure, and free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from reranker.types import EncodedRequest, Slice

MIN_BATCH_TOKENS = 1024
"""Lower bound of an automatic token budget."""
# Attention gathers the prefix's keys for every document again: 8 per token of the budget are several times the usual
# number, and bound a query of thousands of tokens with thousands of tiny documents, which would take gigabytes.
_KEYS_PER_TOKEN = 8


def fit_documents(request: EncodedRequest, start: int, max_tokens: int, max_documents: int) -> int:
    """Return the stop of the longest slice from document `start` within both limits; `start` if none fits."""
    prefix = len(request.prefix)
    tokens_left = max_tokens - prefix + request.cached_prefix_len
    keys_left = max_tokens * _KEYS_PER_TOKEN
    stop = start
    for tokens in map(len, request.documents[start : start + max_documents]):
        tokens_left -= tokens
        keys_left -= prefix + tokens
        if tokens_left < 0 or keys_left < 0:
            break
        stop += 1
    return stop


def split(request: EncodedRequest, max_tokens: int, max_documents: int) -> list[Slice]:
    """Split a request into slices within both limits; a document above `max_tokens` is a slice of its own."""
    slices: list[Slice] = []
    start = 0
    while start < len(request.documents):
        stop = max(fit_documents(request, start, max_tokens, max_documents), start + 1)
        slices.append(Slice(request, start, stop))
        start = stop
    return slices


def full_batches(requests: Iterable[EncodedRequest], limits: Callable[[], tuple[int, int]]) -> Iterator[list[Slice]]:
    """Yield a stream of requests as full batches, in order; a request at a batch's end is split.

    Args:
        requests: read only as far as the next batch needs it.
        limits: max tokens and max documents, called once per batch.
    """
    batch: list[Slice] = []
    tokens, documents = limits()
    for request in requests:
        start = 0
        while start < len(request.documents):
            stop = fit_documents(request, start, tokens, max(0, documents))
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
    """Split into two parts with about as many documents each; None if there is only one document."""
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
