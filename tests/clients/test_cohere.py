"""cohere's Client and ClientV2, synchronous and asynchronous; runs with version 5 and version 7."""

from __future__ import annotations

import asyncio
from typing import Any

import cohere
import pytest
from cohere.core import ApiError

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN

pytestmark = pytest.mark.cohere
ASK: dict[str, Any] = {"model": "rerank-v3.5", "query": QUERY, "documents": DOCUMENTS}


def check(answer: Any) -> None:
    assert answer.results[0].index == BEST
    assert len(answer.results) == 3
    scores = [row.relevance_score for row in answer.results]
    assert scores == sorted(scores, reverse=True)
    assert 0 <= scores[-1] < scores[0] <= 1
    assert answer.meta.billed_units.search_units == 1
    assert answer.meta.tokens.input_tokens > 0


@pytest.mark.parametrize("client", [cohere.Client, cohere.ClientV2])
def test_synchronous(url: str, client: Any) -> None:
    check(client(TOKEN, base_url=url).rerank(**ASK))
    assert len(client(TOKEN, base_url=url).rerank(**ASK, top_n=2).results) == 2


@pytest.mark.parametrize("client", [cohere.AsyncClient, cohere.AsyncClientV2])
def test_asynchronous(url: str, client: Any) -> None:
    async def ask() -> Any:
        return await client(TOKEN, base_url=url).rerank(**ASK)

    check(asyncio.run(ask()))


def test_documents_come_back_with_version_1(url: str) -> None:
    answer = cohere.Client(TOKEN, base_url=url).rerank(**ASK, return_documents=True)
    assert answer.results[0].document.text == DOCUMENTS[BEST]


def test_version_1_needs_no_model_below_api(url: str) -> None:
    answer = cohere.Client(TOKEN, base_url=f"{url}/api").rerank(query=QUERY, documents=DOCUMENTS)
    assert answer.results[0].index == BEST
    assert len(answer.results) == 3
    check(cohere.Client(TOKEN, base_url=f"{url}/api").rerank(**ASK))


def test_version_1_without_a_model_is_refused_by_the_sdk_itself(url: str) -> None:
    with pytest.raises(TypeError, match="must be a mapping"):  # it gets the native array
        cohere.Client(TOKEN, base_url=url).rerank(query=QUERY, documents=DOCUMENTS)


@pytest.mark.parametrize("client", [cohere.Client, cohere.ClientV2])
def test_an_error_has_the_reason(url: str, client: Any) -> None:
    with pytest.raises(ApiError, match=REASON) as wrong:
        client("wrong", base_url=url).rerank(**ASK)
    assert wrong.value.status_code == 401
    assert wrong.value.body["message"].startswith(REASON)
    with pytest.raises(ApiError, match="documents: must hold at least one text") as empty:
        client(TOKEN, base_url=url).rerank(**ASK | {"documents": []})
    assert empty.value.status_code == 422
