"""haystack's rankers: Cohere, Jina, TEI."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN


def run(ranker: Any) -> dict[str, Any]:
    from haystack import Document

    return ranker.run(query=QUERY, documents=[Document(content=text) for text in DOCUMENTS])


def check(got: dict[str, Any]) -> None:
    assert (got["documents"][0].content, len(got["documents"])) == (DOCUMENTS[BEST], 2)


def secret(token: str) -> Any:
    from haystack.utils import Secret

    return Secret.from_token(token)


def test_cohere(url: str) -> None:
    from haystack_integrations.components.rankers.cohere import CohereRanker

    check(run(CohereRanker(api_key=secret(TOKEN), api_base_url=url, top_k=2)))
    with pytest.raises(Exception, match=REASON):
        run(CohereRanker(api_key=secret("wrong"), api_base_url=url))


def test_jina(url: str) -> None:
    from haystack_integrations.components.rankers.jina import JinaRanker

    got = run(JinaRanker(api_key=secret(TOKEN), base_url=f"{url}/v1/rerank", top_k=2))
    check(got)
    assert got["meta"]["model"] == "demo"
    assert got["meta"]["usage"]["total_tokens"] > 0
    with pytest.raises(RuntimeError, match=REASON):
        run(JinaRanker(api_key=secret("wrong"), base_url=f"{url}/v1/rerank"))


def test_tei(url: str) -> None:
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    check(run(HuggingFaceTEIRanker(url=url, token=secret(TOKEN), top_k=2)))
    with pytest.raises(RuntimeError, match=REASON):
        run(HuggingFaceTEIRanker(url=url, token=secret("wrong"), max_retries=0))
