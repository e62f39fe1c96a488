"""Scores that are remembered: who asks the same again waits neither for the queue nor for the device.

An entry is one document's score. Its key is all that the score depends on and a request can change. The model and the
settings are not in it: a process has one of each, and its cache ends with it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections.abc import Awaitable, Callable, Sequence

from cachetools import LRUCache

from reranker.scheduler.events import Observer
from reranker.types import Chunk, DocumentScore, RerankRequest

# Logit, prompt tokens, truncated, query truncated; of the best chunk its place (-1: the document was not split), start
# and stop.
_ENTRY = struct.Struct("<dI??bII")


class ScoreCache:
    """The scores of the documents that were asked for last. For one event loop; nothing here may run beside it.

    Keys and entries are short byte strings: as objects, a million of them would be looked through by every full garbage
    collection, and all requests would wait for that.

    Args:
        entries: documents; at least 1. What `SCORE_CACHE_ENTRIES` says about their size is measured by a test.
        observer: told how many were known.
    """

    def __init__(self, entries: int, observer: Observer) -> None:
        self._entries: LRUCache[bytes, bytes] = LRUCache(entries)
        self._observer = observer
        self._secret = secrets.token_bytes(16)
        """Of the hash: without it nobody can look for two texts that collide."""

    async def scores(
        self, request: RerankRequest, score: Callable[[RerankRequest], Awaitable[Sequence[DocumentScore]]]
    ) -> list[DocumentScore]:
        """What each document of a request got. `score` is called with the documents that are not known, if there are
        any; a document that stands several times in the request is scored once.

        What `score` raises is passed on, and nothing is remembered of that request. Two requests for the same that
        come at the same time are both scored.
        """
        keys = self._keys(request)
        known = {key: _unpack(entry) for key in keys if (entry := self._entries.get(key)) is not None}
        if not request.truncate_query:  # a query that does not fit is an error to this client, and one to the scorer
            known = {key: found for key, found in known.items() if not found.query_truncated}
        rest: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in known:
                rest.setdefault(key, i)
        if rest:
            new = dict(zip(rest, await score(request.only(list(rest.values()))), strict=True))
            self._entries.update((key, _pack(found)) for key, found in new.items())
            known |= new
        self._observer.cache_used(len(keys) - len(rest), len(rest))
        return [known[key] for key in keys]

    def _keys(self, request: RerankRequest) -> list[bytes]:
        """On the event loop: hashing texts takes about as long as it took to read them out of their JSON."""
        # JSON says where each part ends, and holds no lone surrogate. No instruction is the default one, of which a
        # process has one too; who spells it out has entries of his own.
        options = request.max_tokens_per_doc, request.max_chunks_per_doc, request.truncate
        head = json.dumps([request.instruction, request.query, *options]).encode()
        common = hashlib.blake2b(head, digest_size=16, key=self._secret)
        keys = []
        for document in request.documents:
            hashed = common.copy()
            hashed.update(document.encode(errors="surrogatepass"))
            keys.append(hashed.digest())
        return keys


def _pack(score: DocumentScore) -> bytes:
    chunk = score.best_chunk or Chunk(-1, 0, 0)
    cut = score.truncated, score.query_truncated
    return _ENTRY.pack(score.logit, score.prompt_tokens, *cut, chunk.index, chunk.start, chunk.stop)


def _unpack(entry: bytes) -> DocumentScore:
    logit, tokens, truncated, query_truncated, *chunk = _ENTRY.unpack(entry)
    return DocumentScore(logit, tokens, truncated, Chunk(*chunk) if chunk[0] >= 0 else None, query_truncated)
