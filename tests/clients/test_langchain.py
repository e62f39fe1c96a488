"""langchain's compressors: Cohere, Jina, Infinity, NVIDIA."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")


def ranked(compressor: Any) -> list[Any]:
    from langchain_core.documents import Document

    return list(compressor.compress_documents([Document(page_content=text) for text in DOCUMENTS], QUERY))


def check(got: list[Any]) -> None:
    assert (got[0].page_content, len(got)) == (DOCUMENTS[BEST], 2)


def test_cohere(url: str) -> None:
    from langchain_cohere import CohereRerank

    ask = {"base_url": url, "model": "rerank-v3.5", "top_n": 2}
    got = ranked(CohereRerank(cohere_api_key=TOKEN, **ask))
    check(got)
    assert 0 < got[0].metadata["relevance_score"] <= 1
    with pytest.raises(Exception, match=REASON):
        ranked(CohereRerank(cohere_api_key="wrong", **ask))


def test_jina(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from langchain_community.document_compressors import jina_rerank

    monkeypatch.setattr(jina_rerank, "JINA_API_URL", f"{url}/v1/rerank")  # it has no option for the address
    check(ranked(jina_rerank.JinaRerank(jina_api_key=TOKEN, model="jina-reranker-v2", top_n=2)))
    with pytest.raises(RuntimeError, match=REASON):
        ranked(jina_rerank.JinaRerank(jina_api_key="wrong", model="jina-reranker-v2"))


@pytest.mark.parametrize("base", ["", "/v1"])
def test_infinity(url: str, base: str) -> None:
    from infinity_client import Client
    from langchain_community.document_compressors.infinity_rerank import InfinityRerank

    client = Client(base_url=url + base, headers={"Authorization": f"Bearer {TOKEN}"})
    check(ranked(InfinityRerank(client=client, model="m", top_n=2)))
    # infinity_client reports only the status codes that Infinity documents, so the reason does not arrive.
    with pytest.raises(TypeError, match="'NoneType' object is not iterable"):
        ranked(InfinityRerank(client=Client(base_url=url + base), model="m"))


@pytest.mark.parametrize("base", ["", "/v1"])
@pytest.mark.parametrize("model", [None, "nvidia/llama-nemotron-rerank-1b-v2"])
def test_nvidia(url: str, base: str, model: str | None) -> None:
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    ranker = NVIDIARerank(base_url=url + base, api_key=TOKEN, model=model, top_n=2)
    got = ranked(ranker)
    check(got)
    assert got[0].metadata["relevance_score"] > 1  # logits, as NVIDIA's
    again = asyncio.run(ranker.acompress_documents(got, QUERY))
    assert [document.page_content for document in again] == [document.page_content for document in got]


def test_nvidia_shows_the_reason(url: str) -> None:
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    with pytest.raises(Exception, match=REASON):
        ranked(NVIDIARerank(base_url=f"{url}/v1", api_key="wrong", model="any"))
    with pytest.raises(Exception, match="text: must not be empty"):
        NVIDIARerank(base_url=f"{url}/v1", api_key=TOKEN, model="any")._rank([], "")
