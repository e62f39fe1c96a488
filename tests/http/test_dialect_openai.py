from __future__ import annotations

from tests.conftest import Server

MODEL = {"id": "fake", "object": "model", "created": 0, "owned_by": "reranker", "model_type": "rerank"}


def test_models_is_an_openai_list_of_the_served_model(fake_server: Server) -> None:
    assert fake_server.client.get("/v1/models").json() == {"object": "list", "data": [MODEL]}


def test_the_model_answers_to_every_name(fake_server: Server) -> None:
    for name in ("fake", "Qwen/Qwen3-Reranker-0.6B", "my-reranker"):
        assert fake_server.client.get(f"/v1/models/{name}").json() == MODEL
