"""llama-index's postprocessors: Cohere, Jina, TEI, NVIDIA, SiliconFlow, Xinference, DashScope."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def ranked(ranker: Any, query: str = QUERY) -> list[str]:
    from llama_index.core.schema import NodeWithScore, TextNode

    nodes = [NodeWithScore(node=TextNode(text=text), score=0.5) for text in DOCUMENTS]
    return [n.node.get_content() for n in ranker.postprocess_nodes(nodes, query_str=query)]


def check(ranker: Any) -> None:
    got = ranked(ranker)
    assert (got[0], len(got)) == (DOCUMENTS[BEST], 2)


def test_cohere(url: str) -> None:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    check(CohereRerank(api_key=TOKEN, base_url=url, model="rerank-v3.5", top_n=2))
    with pytest.raises(Exception, match=REASON):
        ranked(CohereRerank(api_key="wrong", base_url=url, model="rerank-v3.5"))


@pytest.mark.parametrize("base", ["", "/v1"])
def test_jinaai(url: str, base: str) -> None:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    check(JinaRerank(api_key=TOKEN, base_url=url + base, top_n=2))
    with pytest.raises(RuntimeError, match=REASON):
        ranked(JinaRerank(api_key="wrong", base_url=url + base))


def test_tei(url: str) -> None:
    from llama_index.postprocessor.tei_rerank import TextEmbeddingInference

    check(TextEmbeddingInference(base_url=url, auth_token=f"Bearer {TOKEN}", top_n=2))
    with pytest.raises(AssertionError, match=r"^$"):  # it asserts something about the response and shows nothing of it
        ranked(TextEmbeddingInference(base_url=url, auth_token="Bearer wrong"))


@pytest.mark.parametrize("model", [None, "demo"])
def test_nvidia(url: str, model: str | None) -> None:
    from llama_index.postprocessor.nvidia_rerank import NVIDIARerank

    check(NVIDIARerank(api_key=TOKEN, base_url=f"{url}/v1", model=model, top_n=2))
    with pytest.raises(httpx.HTTPStatusError, match="401 Unauthorized") as wrong_token:
        NVIDIARerank(api_key="wrong", base_url=f"{url}/v1", model=model)
    assert REASON in wrong_token.value.response.text
    with pytest.raises(httpx.HTTPStatusError, match="422 Unprocessable") as no_query:
        ranked(NVIDIARerank(api_key=TOKEN, base_url=f"{url}/v1", model=model), query="")
    assert "query" in no_query.value.response.json()["message"]


def test_nvidia_asks_for_the_name_of_the_served_model(url: str) -> None:
    from llama_index.postprocessor.nvidia_rerank import NVIDIARerank

    with pytest.raises(ValueError, match="No locally hosted any was found"):
        NVIDIARerank(api_key=TOKEN, base_url=f"{url}/v1", model="any")


def test_siliconflow(url: str) -> None:
    from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank

    check(SiliconFlowRerank(api_key=TOKEN, base_url=f"{url}/v1/rerank", top_n=2))
    with pytest.raises(RuntimeError, match=REASON):
        ranked(SiliconFlowRerank(api_key="wrong", base_url=f"{url}/v1/rerank"))


def test_xinference_sends_no_token(url: str, open_url: str) -> None:
    from llama_index.postprocessor.xinference_rerank import XinferenceRerank

    check(XinferenceRerank(base_url=open_url, top_n=2))
    with pytest.raises(Exception, match="no token was sent"):
        ranked(XinferenceRerank(base_url=url))


def test_dashscope(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import dashscope
    from llama_index.postprocessor.dashscope_rerank import DashScopeRerank

    monkeypatch.setattr(dashscope, "base_http_api_url", f"{url}/api/v1")
    check(DashScopeRerank(api_key=TOKEN, top_n=2))
    with pytest.raises(AttributeError, match="'results'"):  # it does not look at the status; dashscope itself does
        ranked(DashScopeRerank(api_key="wrong"))
