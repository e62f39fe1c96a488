"""Bodies whose rows in a batch have the same meaning, and bodies that are refused."""

from __future__ import annotations

from typing import Any

from reranker.request.template import SUFFIX, SYSTEM


def wear(query: str, documents: list[str], instruction: str = "I") -> dict[str, Any]:
    """Texts in the template of the clients that vLLM and vllm-ascend publish."""
    return {
        "query": f"{SYSTEM}<Instruct>: {instruction}\n<Query>: {query}\n",
        "documents": [f"<Document>: {document}{SUFFIX}" for document in documents],
    }


QUERY = "how to compress files"
LONG = " ".join(f"word{i} of a long story" for i in range(60))
DOCUMENTS = ["a game of chess for two players", "gzip compresses files with the deflate algorithm", LONG]
BASE: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS}
OBJECTS = [{"title": "chess", "body": "a game", "year": 2}, {"title": "gzip", "body": "compresses files", "year": 1}]
ROWS: list[dict[str, Any]] = [
    BASE,
    BASE | {"top_k": 3.0, "instruction": ""},
    BASE | {"top_k": "2", "instruct": "Find the bug"},
    BASE | {"top_n": 0, "model": "m"},
    BASE | {"top_k": "", "max_tokens_per_doc": 20},
    BASE | {"max_tokens_per_doc": 20, "max_chunks_per_doc": 4},
    BASE | {"max_chunk_per_doc": "3", "max_tokens_per_doc": "30"},
    BASE | {"truncate": True, "query": f"{QUERY} on Linux " * 60},
    {"query": f"{QUERY} on Linux " * 60, "texts": DOCUMENTS, "documents": None},
    {"query": QUERY, "texts": DOCUMENTS, "truncate": False},
    {"query": QUERY, "documents": OBJECTS, "rank_fields": ["title", "body"]},
    {"query": QUERY, "documents": [{"page_content": "gzip", "title": "t"}, {"content": "chess"}, {"text": "files"}]},
    wear(QUERY, DOCUMENTS[:2]),
    wear(QUERY, DOCUMENTS[:2], "Find the bug"),
]
REFUSED: list[dict[str, Any]] = [
    BASE | {"truncate": False},
    BASE | {"query": f"{QUERY} on Linux " * 60},
    BASE | {"top_k": 0},
    BASE | {"top_n": 2.5},
    {"query": QUERY, "docs": DOCUMENTS},
    {"question": QUERY, "documents": DOCUMENTS},
    {"query": QUERY, "documents": OBJECTS},
    {"query": QUERY, "documents": OBJECTS, "rank_fields": ["title", "text"]},
    {"query": QUERY, "documents": "a"},
    BASE | {"truncate": "maybe"},
]
