"""OpenAI's SDK: its models, and posts to the rerank routes."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN

BODY: dict[str, Any] = {"model": "any", "query": QUERY, "documents": DOCUMENTS}


def test_models(url: str) -> None:
    client = openai.OpenAI(api_key=TOKEN, base_url=f"{url}/v1")
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").object == "model"


@pytest.mark.parametrize("path", ["/rerank", "/reranks"])
def test_rerank(url: str, path: str) -> None:
    client = openai.OpenAI(api_key=TOKEN, base_url=f"{url}/v1")
    got = client.post(path, cast_to=dict[str, Any], body=BODY)
    assert got["results"][0]["index"] == BEST
    assert got["usage"]["completion_tokens"] == 0

    async def ask() -> dict[str, Any]:
        async with openai.AsyncOpenAI(api_key=TOKEN, base_url=f"{url}/v1") as client:
            return await client.post(path, cast_to=dict[str, Any], body=BODY)

    assert asyncio.run(ask())["results"] == got["results"]


@pytest.mark.parametrize("path", ["/rerank", "/reranks"])
def test_the_reason_is_in_the_message(url: str, path: str) -> None:
    client = openai.OpenAI(api_key=TOKEN, base_url=f"{url}/v1")
    with pytest.raises(openai.UnprocessableEntityError) as empty:
        client.post(path, cast_to=dict[str, Any], body=BODY | {"documents": []})
    assert "documents: must hold at least one text" in empty.value.message
    with pytest.raises(openai.AuthenticationError) as wrong:
        client.with_options(api_key="wrong").models.list()
    assert REASON in wrong.value.message
