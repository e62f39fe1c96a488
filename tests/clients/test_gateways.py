"""litellm, and the clients of Xinference, Infinity and AnswerDotAI."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN


@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "hosted_vllm", "huggingface"])
def test_litellm(url: str, provider: str) -> None:
    import litellm

    ask: dict[str, Any] = {
        "model": f"{provider}/some-reranker",
        "query": QUERY,
        "documents": DOCUMENTS,
        "top_n": 2,
        "return_documents": True,
        "api_base": url,
        "api_key": TOKEN,
    }
    for answer in (litellm.rerank(**ask), asyncio.run(litellm.arerank(**ask))):
        assert answer.results[0]["index"] == BEST
        assert len(answer.results) == 2
        assert answer.results[0]["document"] == {"text": DOCUMENTS[BEST]}
    with pytest.raises(Exception, match=REASON):
        litellm.rerank(**ask | {"api_key": "wrong"})


def test_litellm_nvidia(url: str) -> None:
    import litellm

    server = {"api_base": url, "api_key": TOKEN}
    answer = litellm.rerank(model="nvidia_nim/ranking/any", query=QUERY, documents=DOCUMENTS, top_n=2, **server)
    assert answer.results[0]["index"] == BEST
    assert len(answer.results) == 2
    assert answer.results[0]["relevance_score"] > 1  # a logit


def test_xinference_with_a_token(url: str) -> None:
    from xinference_client.client.restful.restful_client import RESTfulRerankModelHandle

    # Its Client asks an address of Xinference's own whether a token is needed, so with one the handle is made by hand.
    handle = RESTfulRerankModelHandle("m", url, auth_headers={"Authorization": f"Bearer {TOKEN}"})
    got = handle.rerank(DOCUMENTS, QUERY, top_n=2, return_documents=True)
    assert got["results"][0]["document"] == {"text": DOCUMENTS[BEST]}
    assert len(got["results"]) == 2
    with pytest.raises(RuntimeError, match=REASON):
        RESTfulRerankModelHandle("m", url, auth_headers={"Authorization": "Bearer x"}).rerank(DOCUMENTS, QUERY)


def test_xinference_without_a_token(open_url: str) -> None:
    from xinference_client import RESTfulClient

    got = RESTfulClient(open_url).get_model("some-reranker").rerank(DOCUMENTS, QUERY)
    assert got["results"][0]["index"] == BEST


@pytest.mark.parametrize("base", ["", "/v1"])
def test_infinity_client(url: str, base: str) -> None:
    from infinity_client import Client
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    client = Client(base_url=url + base, headers={"Authorization": f"Bearer {TOKEN}"})
    body = RerankInput(query=QUERY, documents=DOCUMENTS, model="m")
    for got in (rerank.sync(client=client, body=body), asyncio.run(rerank.asyncio(client=client, body=body))):
        assert got.results[0].index == BEST
        assert got.usage.total_tokens > 0


def test_infinity_client_shows_the_reason_where_asked(url: str) -> None:
    from infinity_client import Client, errors
    from infinity_client.api.default import rerank
    from infinity_client.models import RerankInput

    body = RerankInput(query=QUERY, documents=DOCUMENTS)
    assert rerank.sync(client=Client(base_url=url), body=body) is None
    strict = Client(base_url=url, headers={"Authorization": "Bearer wrong"}, raise_on_unexpected_status=True)
    with pytest.raises(errors.UnexpectedStatus, match=REASON):
        rerank.sync(client=strict, body=body)
    client = Client(base_url=url, headers={"Authorization": f"Bearer {TOKEN}"})
    with pytest.raises(AttributeError):  # for a 422 it wants a list of objects, other clients want a text
        rerank.sync(client=client, body=RerankInput(query="", documents=DOCUMENTS))


@pytest.mark.parametrize(
    ("provider", "path"), [("cohere", "/v1/rerank"), ("jina", "/v1/rerank"), ("text-embeddings-inference", "/rerank")]
)
def test_rerankers(url: str, provider: str, path: str) -> None:
    from rerankers.models.api_rankers import APIRanker

    ranker = APIRanker("some-reranker", api_key=TOKEN, api_provider=provider, verbose=0, url=url + path)
    got = ranker.rank(QUERY, DOCUMENTS, doc_ids=[0, 1, 2])
    assert got.results[0].document.doc_id == BEST
    assert len(got.results) == 3
    wrong = APIRanker("some-reranker", api_key="wrong", api_provider=provider, verbose=0, url=url + path)
    with pytest.raises((KeyError, TypeError)):  # it reads the body of an error as a ranking
        wrong.rank(QUERY, DOCUMENTS)
