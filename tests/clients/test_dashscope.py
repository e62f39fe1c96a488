"""Alibaba's dashscope: TextReRank and AioTextReRank."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN

ASK: dict[str, Any] = {"model": "qwen3-rerank", "query": QUERY, "documents": DOCUMENTS}


@pytest.fixture(autouse=True)
def _address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import dashscope

    monkeypatch.setattr(dashscope, "base_http_api_url", f"{url}/api/v1")


def test_ranking() -> None:
    from dashscope import TextReRank

    plain = TextReRank.call(**ASK, api_key=TOKEN)
    assert plain.status_code == 200
    assert plain.output.results[0].index == BEST
    assert len(plain.output.results) == 3
    assert plain.usage.total_tokens > 0
    assert plain.request_id
    options = {"top_n": 2, "return_documents": True, "instruct": "Find the command."}
    two = TextReRank.call(**ASK, **options, api_key=TOKEN).output.results
    assert len(two) == 2
    assert two[0]["document"] == {"text": DOCUMENTS[BEST]}  # its attribute of this name is always None
    assert two[0].relevance_score != plain.output.results[0].relevance_score


def test_asynchronous() -> None:
    from dashscope import AioTextReRank
    from dashscope.api_entities.aio_session import close_shared_aio_session

    async def ask() -> Any:
        try:
            return await AioTextReRank.call(**ASK, api_key=TOKEN)
        finally:
            await close_shared_aio_session()

    assert asyncio.run(ask()).output.results[0].index == BEST


def test_the_reason_is_in_the_response() -> None:
    from dashscope import TextReRank

    got = TextReRank.call(**ASK, api_key="wrong")
    assert got.status_code == 401
    assert got.message.startswith(REASON)
    got = TextReRank.call(**ASK, top_n=-1, api_key=TOKEN)
    assert got.status_code == 422
    assert "top_n" in got.message
