"""langchain, llama-index and haystack."""

from __future__ import annotations

from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, TOKEN


def langchain_documents() -> Any:
    from langchain_core.documents import Document

    return [Document(page_content=text) for text in DOCUMENTS]


def test_langchain_cohere(url: str) -> None:
    from langchain_cohere import CohereRerank

    ranker = CohereRerank(cohere_api_key=TOKEN, base_url=url, model="rerank-v3.5", top_n=2)
    got = ranker.compress_documents(langchain_documents(), QUERY)
    assert got[0].page_content == DOCUMENTS[BEST]
    assert len(got) == 2
    assert 0 < got[0].metadata["relevance_score"] <= 1


def test_langchain_jina(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain_community.document_compressors import jina_rerank

    monkeypatch.setattr(jina_rerank, "JINA_API_URL", f"{url}/v1/rerank")  # it has no option for the address
    ranker = jina_rerank.JinaRerank(jina_api_key=TOKEN, model="jina-reranker-v2", top_n=2)
    got = ranker.compress_documents(langchain_documents(), QUERY)
    assert got[0].page_content == DOCUMENTS[BEST]
    assert len(got) == 2
    wrong = jina_rerank.JinaRerank(jina_api_key="wrong", model="jina-reranker-v2")
    with pytest.raises(RuntimeError, match="the token is wrong"):
        wrong.compress_documents(langchain_documents(), QUERY)


@pytest.mark.parametrize("base", ["", "/v1"])
def test_langchain_infinity(url: str, base: str) -> None:
    from infinity_client import Client
    from langchain_community.document_compressors.infinity_rerank import InfinityRerank

    client = Client(base_url=url + base, headers={"Authorization": f"Bearer {TOKEN}"})
    got = InfinityRerank(client=client, model="m", top_n=2).compress_documents(langchain_documents(), QUERY)
    assert got[0].page_content == DOCUMENTS[BEST]
    assert len(got) == 2


def llama_index(ranker: Any) -> list[str]:
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in DOCUMENTS]
    return [n.node.get_content() for n in ranker.postprocess_nodes(nodes, query_str=QUERY)]


def test_llama_index_cohere(url: str) -> None:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    got = llama_index(CohereRerank(api_key=TOKEN, base_url=url, model="rerank-v3.5", top_n=2))
    assert (got[0], len(got)) == (DOCUMENTS[BEST], 2)


@pytest.mark.parametrize("base", ["", "/v1"])
def test_llama_index_jinaai(url: str, base: str) -> None:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    got = llama_index(JinaRerank(api_key=TOKEN, base_url=url + base, top_n=2))
    assert (got[0], len(got)) == (DOCUMENTS[BEST], 2)


def test_llama_index_tei(url: str) -> None:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    got = llama_index(TextEmbeddingInference(base_url=url, auth_token=f"Bearer {TOKEN}", top_n=2))
    assert (got[0], len(got)) == (DOCUMENTS[BEST], 2)


def haystack(ranker: Any) -> list[str]:
    from haystack import Document

    return [d.content for d in ranker.run(query=QUERY, documents=[Document(content=t) for t in DOCUMENTS])["documents"]]


def secret() -> Any:
    from haystack.utils import Secret

    return Secret.from_token(TOKEN)


def test_haystack_cohere(url: str) -> None:
    from haystack_integrations.components.rankers.cohere import CohereRanker

    got = haystack(CohereRanker(api_key=secret(), api_base_url=url, top_k=2))
    assert (got[0], len(got)) == (DOCUMENTS[BEST], 2)


def test_haystack_jina(url: str) -> None:
    from haystack import Document
    from haystack_integrations.components.rankers.jina import JinaRanker

    ranker = JinaRanker(api_key=secret(), base_url=f"{url}/v1/rerank", top_k=2)
    got = ranker.run(query=QUERY, documents=[Document(content=text) for text in DOCUMENTS])
    assert (got["documents"][0].content, len(got["documents"])) == (DOCUMENTS[BEST], 2)
    assert got["meta"]["model"] == "demo"
    assert got["meta"]["usage"]["total_tokens"] > 0


def test_haystack_tei(url: str) -> None:
    from haystack_integrations.components.rankers.huggingface_api import HuggingFaceTEIRanker

    got = haystack(HuggingFaceTEIRanker(url=url, token=secret(), top_k=2))
    assert (got[0], len(got)) == (DOCUMENTS[BEST], 2)
