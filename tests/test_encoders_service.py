"""Encoders behind the whole service and the command line: every score is that of transformers, one pair at a time."""

from __future__ import annotations

import asyncio
import gc
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, expect

from app import create_app
from config import Settings
from reranker import Scorer
from reranker.engine.scores import sigmoid
from reranker.http.state import service_of
from tests import test_forms_service as forms
from tests.cli.command import cli
from tests.conftest import Server, Start
from tests.engine.encoders import KINDS, POSITIONS, SPECIAL, texts_with
from tests.engine.pairs import Pairs
from tests.evaluate.test_evaluation import CORPUS, QUERIES, RUN, trec
from tests.http.conftest import browser
from tests.http.test_metrics import samples, stop, value

__all__ = ["browser"]  # the fixture

FAMILIES = {
    "xlm-roberta": "XLM-RoBERTa",
    "bert": "BERT",
    "modernbert-cls": "ModernBERT",
    "modernbert-mean": "ModernBERT",
}
OPTIONS = {"MODEL_DEVICE": "cpu", "MODEL_PRECISION": "float32", "MAX_BATCH_TOKENS": "600"}
"""MAX_SEQ_LENGTH is not set, so the model's own length holds."""
assert POSITIONS == forms.LENGTH
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Encoder(forms.Form):
    """A served encoder and its reference."""

    reference: Any  # Pairs

    def ids(self, query: str, document: str, instruction: str | None = None, *, space: bool = True) -> list[int]:
        return list(self.reference.ids(query, document))


def build(kind: str, folder: Path, **changes: Any) -> Encoder:
    KINDS[kind](folder, **changes)
    facts = {"family": FAMILIES[kind], "score": "score head", "prompt": "the tokenizer's pair", "adapter": None}
    return Encoder(folder, Pairs(folder), reads_instruction=False, facts=facts)


@pytest.fixture
def form(request: pytest.FixtureRequest, tmp_path: Path) -> Encoder:
    return build(request.param, tmp_path / "model")


each_kind = pytest.mark.parametrize("form", KINDS, indirect=True)


def check_control_tokens_of_the_model_are_text(form: Encoder, server: Server) -> None:
    texts = texts_with(SPECIAL[form.reference.model.config.model_type])
    for query in (forms.QUERY, texts[6]):
        expected = [form.logit(query, text) for text in texts]
        response = forms.post(server, "/v1/rerank", query=query, documents=texts, raw_scores=True)
        assert forms.logits(response) == pytest.approx(expected, abs=1e-5)


def check_the_limits_are_the_models(form: Encoder, server: Server) -> None:
    info = server.client.get("/info").json()
    assert info["max_input_length"] == POSITIONS
    assert info["max_batch_tokens"] == int(OPTIONS["MAX_BATCH_TOKENS"])


def check_a_request_of_several_passes(form: Encoder, server: Server) -> None:
    """Ten times the token budget."""
    documents = [f"file {i} " + "gzip " * (i % 40) for i in range(300)]
    before = value(samples(server), "reranker_prompt_tokens_total")
    response = forms.post(server, "/v1/rerank", query=forms.QUERY, documents=documents, raw_scores=True)
    expected = [form.logit(forms.QUERY, document) for document in documents]
    assert forms.logits(response) == pytest.approx(expected, abs=1e-5)
    tokens = sum(len(form.ids(forms.QUERY, document)) for document in documents)
    assert int(response.headers["x-prompt-tokens"]) == tokens > 10 * int(OPTIONS["MAX_BATCH_TOKENS"])
    assert value(samples(server), "reranker_prompt_tokens_total") >= before


def check_the_dialects_of_vllm_jina_and_the_others(form: Encoder, server: Server) -> None:
    documents = ["gzip compresses a file", "a game of chess", "如何压缩文件"]
    expected = [sigmoid(form.logit(forms.QUERY, document)) for document in documents]
    passages = {"query": {"text": forms.QUERY}, "passages": [{"text": document} for document in documents]}
    rankings = forms.post(server, "/v1/ranking", model="m", **passages).json()["rankings"]
    found = {row["index"]: sigmoid(row["logit"]) for row in rankings}
    assert found == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    for path, body in (
        ("/v1/rerank", {"model": "jina-reranker", "documents": [{"text": document} for document in documents]}),
        ("/v2/rerank", {"model": "rerank-v3.5", "documents": documents, "top_n": 3}),
        ("/v1/rerank", {"model": "vllm", "documents": documents}),
    ):
        rows = forms.post(server, path, query=forms.QUERY, **body).json()["results"]
        assert {r["index"]: r["relevance_score"] for r in rows} == pytest.approx(dict(enumerate(expected)), abs=1e-5)
    scores = forms.post(server, "/v1/score", text_1=forms.QUERY, text_2=documents).json()["data"]
    assert [row["score"] for row in scores] == pytest.approx(expected, abs=1e-5)


CHECKS = (
    *forms.CHECKS,
    check_control_tokens_of_the_model_are_text,
    check_the_limits_are_the_models,
    check_a_request_of_several_passes,
    check_the_dialects_of_vllm_jina_and_the_others,
)


@pytest.mark.slow
@each_kind
def test_it_is_served(form: Encoder, start: Start) -> None:
    """One server for all checks: it takes longer to start than they take."""
    server = start(MODEL_NAME_OR_PATH=str(form.folder), SCORE_CACHE_ENTRIES="1000", **OPTIONS)
    for check in CHECKS:
        check(form, server)
    stop(server)


def test_an_encoder_is_served(tmp_path: Path) -> None:
    """The quick one of the default suite: the whole application in this process."""
    form = build("xlm-roberta", tmp_path / "model")
    options: dict[str, Any] = {"device": "cpu", "precision": "float32", "max_batch_tokens": 600}
    app = create_app(Settings(_env_file=None), lambda: Scorer.load(form.folder, **options))
    body = {"query": forms.QUERY, "documents": forms.TEXTS, "instruction": "Find code", "raw_scores": True}

    async def main() -> httpx.Response:
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://h") as client,
        ):
            await service_of(app).batcher.wait_until_loaded()
            assert (await client.get("/info")).json()["max_input_length"] == POSITIONS
            return await client.post("/v1/rerank", content=json.dumps(body), headers=JSON)

    threshold = gc.get_threshold()
    try:
        response = asyncio.run(main())
    finally:
        gc.unfreeze()
        gc.set_threshold(*threshold)
    expected = [form.logit(forms.QUERY, text) for text in forms.TEXTS]
    assert forms.logits(response) == pytest.approx(expected, abs=1e-5)
    assert response.headers["x-ignored-fields"] == "instruction"


@pytest.mark.slow
@each_kind
def test_the_command_line(form: Encoder, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    forms.check_the_command_line(form, tmp_path / "work")


@pytest.mark.slow
@pytest.mark.parametrize("second", KINDS)
def test_a_decoder_and_an_encoder_in_one_evaluation(second: str, tmp_path: Path) -> None:
    """Two models of one table, each with the ranking of its own reference."""
    decoder = forms.BUILD["score-head"](tmp_path / "decoder")
    encoder = build(second, tmp_path / "encoder")
    models = ["--model", decoder.folder, "--model", encoder.folder]
    done = cli("evaluate", *trec(tmp_path), *models, "--save-run", "new.txt", cwd=tmp_path, env=OPTIONS)
    report = json.loads(done.stdout)
    assert [system.get("model") for system in report["systems"][1:]] == [str(decoder.folder), str(encoder.folder)]
    for i, form in enumerate((decoder, encoder), 1):
        found: dict[str, list[str]] = {}
        for line in (tmp_path / f"new-{i}.txt").read_text().splitlines():
            query, _, document, *_ = line.split()
            found.setdefault(query, []).append(document)
        for query, documents in RUN.items():
            scores = {document: form.logit(QUERIES[query], CORPUS[document]) for document in documents}
            assert found[query] == sorted(scores, key=scores.__getitem__, reverse=True)


@pytest.mark.slow
def test_the_page_ranks_and_says_that_no_instruction_is_read(tmp_path: Path, start: Start, browser: Browser) -> None:
    form = build("bert", tmp_path / "model")
    server = start(MODEL_NAME_OR_PATH=str(form.folder), **OPTIONS)
    page = browser.new_page(locale="en-US")
    page.goto(f"http://127.0.0.1:{server.port}/")
    page.fill("#query", forms.QUERY)
    page.fill("#documents", "a game of chess\ngzip compresses a file")
    page.fill("#instruction", "Find code")
    page.click("#rank")
    expect(page.locator("#ranking p")).to_have_count(2)
    documents = ["a game of chess", "gzip compresses a file"]
    best = max(documents, key=lambda document: form.logit(forms.QUERY, document))
    expect(page.locator("#ranking p").first).to_have_text(best)
    expect(page.locator("#warnings")).to_have_text("The served model reads no instruction, so it was ignored.")
    page.close()


@pytest.mark.slow
def test_two_workers_and_two_labels(tmp_path: Path, start: Start) -> None:
    form = build("modernbert-mean", tmp_path / "model", num_labels=2)
    server = start(MODEL_NAME_OR_PATH=str(form.folder), WORKERS="2", **OPTIONS)
    documents = ["gzip compresses a file", "a game of chess", "如何压缩文件", ""]
    expected = [sigmoid(form.logit(forms.QUERY, document)) for document in documents]
    for _ in range(20):
        response = forms.post(server, "/v1/rerank", query=forms.QUERY, documents=documents)
        assert forms.logits(response) == pytest.approx(expected, abs=1e-5)
