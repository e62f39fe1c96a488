"""The score cache: a repeated document waits neither for the queue nor for the device.

An entry is one document's score. Its key holds everything that the score depends on and a request can change. Model and
settings are not in the key: a process has one of each, and its cache ends with it.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import struct
from collections import OrderedDict
from collections.abc import Mapping

from reranker.types import Chunk, DocumentScore, RerankRequest

# Logit, prompt tokens, truncated, query truncated; of the best chunk the index (-1: the document was not split), start
# and stop.
_ENTRY = struct.Struct("<dI??bII")


class ScoreCache:
    """A least-recently-used cache of scores, for one event loop.

    Keys and entries are short byte strings: every full garbage collection would scan a million objects, and pause all
    requests.

    Args:
        entries: documents; at least 1. A test measures the size that `SCORE_CACHE_ENTRIES` documents.
    """

    def __init__(self, entries: int) -> None:
        self._max_entries = entries
        self._entries: OrderedDict[bytes, bytes] = OrderedDict()
        """Least recently used first."""
        self._secret = secrets.token_bytes(16)
        """Of the hash: without it a client could search for two texts that collide."""

    def lookup(self, request: RerankRequest) -> tuple[list[bytes], dict[bytes, DocumentScore], dict[bytes, int]]:
        """Return one key per document, the cached scores by key, and each other key's first document (its index).

        Equal documents share a key.
        """
        keys = self._keys(request)
        scores = {key: _unpack(self._entries[key]) for key in keys if key in self._entries}
        for key in scores:
            self._entries.move_to_end(key)
        if not request.truncate_query:  # then a query that does not fit is an error, which the scorer raises
            scores = {key: score for key, score in scores.items() if not score.query_truncated}
        missing: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key not in scores:
                missing.setdefault(key, i)
        return keys, scores, missing

    def store(self, scores: Mapping[bytes, DocumentScore]) -> None:
        """Enter scores by the keys of a lookup."""
        for key, score in scores.items():
            self._entries[key] = _pack(score)
            self._entries.move_to_end(key)
            if len(self._entries) > self._max_entries:
                self._entries.popitem(last=False)

    def _keys(self, request: RerankRequest) -> list[bytes]:
        """Hash on the event loop: it takes about as long as parsing the same texts from JSON did."""
        # JSON marks where each part ends, and escapes lone surrogates. A missing instruction means the default one, of
        # which a process has only one; a client that spells it out has its own entries.
        options = request.max_tokens_per_doc, request.max_chunks_per_doc, request.truncate
        head = json.dumps([request.instruction, request.query, *options]).encode()
        common = hashlib.blake2b(head, digest_size=16, key=self._secret)
        keys = []
        for document in request.documents:
            digest = common.copy()
            digest.update(document.encode(errors="surrogatepass"))
            keys.append(digest.digest())
        return keys


def _pack(score: DocumentScore) -> bytes:
    chunk = score.best_chunk or Chunk(-1, 0, 0)
    truncated = score.truncated, score.query_truncated
    return _ENTRY.pack(score.logit, score.prompt_tokens, *truncated, chunk.index, chunk.start, chunk.stop)


def _unpack(entry: bytes) -> DocumentScore:
    logit, tokens, truncated, query_truncated, *chunk = _ENTRY.unpack(entry)
    return DocumentScore(logit, tokens, truncated, Chunk(*chunk) if chunk[0] >= 0 else None, query_truncated)
