"""Packages of products: agno, mem0, LanceDB, LightRAG, Open WebUI's external reranker, Dify's plugin SDK.

Where a package hides an error from its user, the test says what it does instead.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from conftest import BEST, DOCUMENTS, QUERY, REASON, TOKEN

pytestmark = pytest.mark.products


@pytest.fixture
def cohere_address(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address for packages that have no option for it. Cohere's SDK reads it when it is imported."""
    monkeypatch.setenv("CO_API_URL", url)
    for name in [name for name in sys.modules if name.partition(".")[0] == "cohere"]:
        monkeypatch.delitem(sys.modules, name)


class Log(logging.Handler):
    """What a logger that does not propagate writes."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += logging.Formatter().format(record)


@pytest.fixture
def agno_log() -> Any:
    from agno.utils.log import logger

    log = Log()
    logger.addHandler(log)
    yield log
    logger.removeHandler(log)


def agno_documents() -> list[Any]:
    from agno.knowledge.document import Document

    return [Document(content=text) for text in DOCUMENTS]


def contents(documents: list[Any]) -> list[str]:
    return [document.content for document in documents]


@pytest.mark.usefixtures("cohere_address")
def test_agno_cohere(agno_log: Log) -> None:
    from agno.knowledge.reranker.cohere import CohereReranker

    got = CohereReranker(api_key=TOKEN, top_n=2).rerank(QUERY, agno_documents())
    assert (contents(got)[0], len(got)) == (DOCUMENTS[BEST], 2)
    assert 0 < got[0].reranking_score <= 1
    # After an error it returns the documents as they came, and the reason is in its log.
    assert contents(CohereReranker(api_key="wrong").rerank(QUERY, agno_documents())) == DOCUMENTS
    assert REASON in agno_log.text


def test_agno_infinity(url: str, agno_log: Log) -> None:
    from agno.knowledge.reranker.infinity import InfinityReranker

    for address in (url, f"{url}/v1"):
        got = InfinityReranker(url=address, api_key=TOKEN, top_n=2).rerank(QUERY, agno_documents())
        assert (contents(got)[0], len(got)) == (DOCUMENTS[BEST], 2)
    got = asyncio.run(InfinityReranker(url=url, api_key=TOKEN).arerank(QUERY, agno_documents()))
    assert contents(got)[0] == DOCUMENTS[BEST]
    # Its log does not have the reason, because infinity_client drops it.
    assert contents(InfinityReranker(url=url, api_key="wrong").rerank(QUERY, agno_documents())) == DOCUMENTS
    assert "Rerank request returned None" in agno_log.text


@pytest.mark.usefixtures("cohere_address")
def test_mem0(caplog: pytest.LogCaptureFixture) -> None:
    from mem0.configs.rerankers.cohere import CohereRerankerConfig
    from mem0.reranker.cohere_reranker import CohereReranker

    memories = [{"memory": text} for text in DOCUMENTS]
    got = CohereReranker(CohereRerankerConfig(api_key=TOKEN)).rerank(QUERY, memories, top_k=2)
    assert (got[0]["memory"], len(got)) == (DOCUMENTS[BEST], 2)
    assert 0 < got[0]["rerank_score"] <= 1
    # After an error it returns the memories as they came with the score 0, and the reason is in its log.
    got = CohereReranker(CohereRerankerConfig(api_key="wrong")).rerank(QUERY, memories)
    assert got == [{"memory": text, "rerank_score": 0.0} for text in DOCUMENTS]
    assert REASON in caplog.text


@pytest.fixture
def table(tmp_path: Path) -> Any:
    import lancedb

    rows = [{"vector": [float(i), 0.0], "text": text} for i, text in enumerate(DOCUMENTS)]
    return lancedb.connect(tmp_path).create_table("documents", rows)


@pytest.mark.usefixtures("cohere_address")
@pytest.mark.parametrize("name", ["CohereReranker", "JinaReranker"])
def test_lancedb(url: str, table: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lancedb import rerankers
    from lancedb.rerankers import jinaai

    monkeypatch.setattr(jinaai, "API_URL", f"{url}/v1/rerank")  # it has no option for the address
    reranker = getattr(rerankers, name)
    got = table.search([0.0, 0.0]).rerank(reranker(api_key=TOKEN, top_n=2), query_string=QUERY).to_list()
    assert (got[0]["text"], len(got)) == (DOCUMENTS[BEST], 2)
    assert 0 < got[0]["_relevance_score"] <= 1
    with pytest.raises(Exception, match=REASON):
        table.search([0.0, 0.0]).rerank(reranker(api_key="wrong"), query_string=QUERY).to_list()


@pytest.mark.parametrize(
    ("function", "path"),
    [
        ("cohere_rerank", "/v2/rerank"),
        ("jina_rerank", "/v1/rerank"),
        ("ali_rerank", "/api/v1/services/rerank/text-rerank/text-rerank"),
    ],
)
def test_lightrag(url: str, function: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import tenacity
    from lightrag import rerank
    from lightrag.utils import logger

    monkeypatch.setattr(rerank.generic_rerank_api.retry, "wait", tenacity.wait_none())
    ask: dict[str, Any] = {"query": QUERY, "documents": DOCUMENTS, "top_n": 2, "base_url": url + path}
    got = asyncio.run(getattr(rerank, function)(**ask, api_key=TOKEN))
    assert (got[0]["index"], len(got)) == (BEST, 2)
    assert 0 < got[0]["relevance_score"] <= 1
    # It sends a refused request three times. The reason is in its log and in the cause of the error.
    log = Log()
    logger.addHandler(log)
    with pytest.raises(tenacity.RetryError) as caught:
        asyncio.run(getattr(rerank, function)(**ask, api_key="wrong"))
    logger.removeHandler(log)
    assert REASON in str(caught.value.last_attempt.exception())
    assert log.text.count("Rerank API error 401") == 3


def test_open_webui(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    stubs = {
        "open_webui.env": {"ENABLE_FORWARD_USER_INFO_HEADERS": True, "REQUESTS_VERIFY": True},
        "open_webui.utils.headers": {
            "include_user_info_headers": lambda headers, user: headers | {"X-OpenWebUI-User-Name": user}
        },
    }
    for name, attributes in stubs.items():
        module = ModuleType(name)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(Path(sys.prefix) / "open-webui"))
    from open_webui.retrieval.models.external import ExternalReranker

    pairs = [(QUERY, text) for text in DOCUMENTS]
    for path in ("/v1/rerank", "/rerank", "/v2/rerank", "/api/v1/rerank"):
        scores = ExternalReranker(TOKEN, url + path).predict(pairs, user="Zoë")
        assert scores is not None
        assert scores.index(max(scores)) == BEST
        assert all(0 <= score <= 1 for score in scores)
    # After an error it returns None; its log has the status, not the reason.
    assert ExternalReranker("wrong", f"{url}/v1/rerank").predict(pairs) is None
    assert "401 Client Error: Unauthorized" in caplog.text
    assert REASON not in caplog.text


DIFY = """
import sys
from dify_plugin import OAICompatRerankModel
from dify_plugin.errors.model import CredentialsValidateFailedError, InvokeError

url, token, query, *documents = sys.argv[1:]
for path in ("/v1", "/v1/", ""):
    settings = {"endpoint_url": url + path, "api_key": token}
    OAICompatRerankModel([]).validate_credentials("any", settings)
    got = OAICompatRerankModel([]).invoke("any", settings, query, documents, top_n=2)
    print(got.docs[0].index, [row.score for row in got.docs], got.docs[0].text)
try:
    OAICompatRerankModel([]).invoke("any", settings | {"api_key": "wrong"}, query, documents)
except InvokeError as error:
    print(error)
try:
    OAICompatRerankModel([]).validate_credentials("any", settings | {"api_key": "wrong"})
except CredentialsValidateFailedError as error:
    print(error)
"""


def test_dify(url: str) -> None:
    # A process of its own, because dify_plugin replaces sockets and threads by gevent's when it is imported.
    command = [sys.executable, "-c", DIFY, url, TOKEN, QUERY, *DOCUMENTS]
    got = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert got.returncode == 0, got.stderr
    *rankings, invoked, validated = got.stdout.splitlines()
    assert rankings == [f"{BEST} [1.0, 0.0] {DOCUMENTS[BEST]}"] * 3  # it rescales the scores: best 1, worst 0
    # An error has the status and the address, not the reason.
    assert "401 Client Error: Unauthorized" in invoked
    assert "401 Client Error: Unauthorized" in validated
