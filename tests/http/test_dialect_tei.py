from __future__ import annotations

import pytest

from reranker import __version__
from reranker.engine.scores import sigmoid
from tests.conftest import FAKE, Server, Start
from tests.http.test_rerank import ALL


@pytest.mark.parametrize("path", ALL)
@pytest.mark.parametrize("model", [{}, {"model": "BAAI/bge-reranker-large"}])
def test_texts_mean_the_array_on_every_route(fake_server: Server, path: str, model: dict[str, str]) -> None:
    body = {"query": "red fish", "texts": ["a bird", "red fish"], **model}
    assert fake_server.client.post(path, json=body).json() == [
        {"index": 1, "score": sigmoid(2)},
        {"index": 0, "score": sigmoid(0)},
    ]
    assert fake_server.client.post(path, json=body | {"return_text": True, "raw_scores": True}).json() == [
        {"index": 1, "score": 2.0, "text": "red fish"},
        {"index": 0, "score": 0.0, "text": "a bird"},
    ]


def test_errors_name_texts(fake_server: Server) -> None:
    for texts, detail in (
        ([], "texts: "),
        (["a", 5], "texts[1]: "),
        (["a"] * 2049, "texts: at most 2048"),
        (None, "documents: is required"),
    ):
        answer = fake_server.client.post("/rerank", json={"query": "q", "texts": texts})
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith(detail)


def test_info_is_what_difys_plugin_accepts(fake_server: Server) -> None:
    info = fake_server.client.get("/info").json()
    # The plugin: the first key of model_type, then these two numbers.
    assert list(info["model_type"]) == ["reranker"]
    assert (info["max_input_length"], info["max_client_batch_size"]) == (8192, 2048)
    assert (info["model_id"], info["model_dtype"], info["version"]) == ("fake", "float32", __version__)
    assert info["max_batch_tokens"] == 1000
    assert (info["device"], info["demo"]) == ("cpu", False)


def test_nothing_is_said_of_a_model_that_is_still_loading(start: Start) -> None:
    server = start(command=FAKE, wait="loading", FAKE_LOAD_SECONDS="10")
    for path in ("/info", "/v1/models", "/v1/models/m"):
        answer = server.client.get(path)
        assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
        assert answer.headers["retry-after"] == "5"
