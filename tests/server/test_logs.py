"""LOG_FORMAT=json: every line of every logger is one JSON object, and no line holds what a client sent."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from config import Settings, load_settings, log_config
from reranker.server.logs import JsonFormatter
from tests.conftest import GUNICORN, Server, Start

FAKE = [*GUNICORN[:-1], "tests.fake_app:app"]
UVICORN = [str(Path(sys.executable).with_name("uvicorn")), "tests.fake_app:app", "--port", "{port}"]
TOKEN = "s3cr3t-token"
CRAWLER = "s3cr3t-token-of-the-crawler"
QUERY = "confidential-query"
DOCUMENT = "confidential-document"


def lines(server: Server) -> list[dict[str, Any]]:
    """The log, every line parsed, strictly."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in server.log.splitlines()]


def use(server: Server) -> None:
    """Requests of all kinds, good and bad, with texts and tokens that must not be logged."""
    client = server.client
    body = {"query": QUERY, "documents": [DOCUMENT, "other"]}
    assert client.post("/v1/rerank", json=body, headers={"X-Request-Id": "good-1"}).status_code == 200
    assert client.post("/v1/rerank", json=body | {"top_k": f"{QUERY}!"}).status_code == 422
    assert client.post("/v1/rerank", content=f'{{"query": "{QUERY}'.encode()).status_code == 400
    poison = {"query": QUERY, "documents": [f"{DOCUMENT} poison"]}
    assert client.post("/v1/rerank", json=poison, headers={"X-Request-Id": "bad-1"}).status_code == 500
    bare = {"Authorization": ""}
    del client.headers["Authorization"]
    try:
        assert client.post(f"/v1/rerank?access_token={TOKEN}", json=body).status_code == 200
        assert client.post(f"/v1/rerank?access_token={TOKEN}-wrong", json=body).status_code == 401
        assert client.get("/health", headers=bare | {"Authorization": f"Basic {TOKEN}"}).status_code == 401
    finally:
        client.headers["Authorization"] = f"Bearer {TOKEN}"
    assert client.get('/nothing"here%0aforged').status_code == 404


@pytest.mark.parametrize("command", [FAKE, UVICORN], ids=["gunicorn", "uvicorn"])
def test_every_line_is_json_and_none_tells_a_text_or_a_token(start: Start, command: list[str]) -> None:
    options = {"LOG_FORMAT": "json", "LOG_LEVEL": "DEBUG", "WORKERS": "2", "MODEL_DEVICE": "cpu"}
    accepted = f"crawler={CRAWLER}, {TOKEN}"
    server = start(command=command, token=TOKEN, ACCESS_TOKEN=accepted, **options)
    named = {"Authorization": f"Bearer {CRAWLER}", "X-Request-Id": "named-1"}
    assert server.client.get("/v1/models", headers=named).status_code == 200
    use(server)
    server.client.close()
    server.stop()
    found = lines(server)
    for secret in (TOKEN, "confidential"):
        assert secret not in server.log
    for line in found:
        assert list(line)[:5] == ["time", "level", "logger", "pid", "message"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])
        assert line["level"] in ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    loggers = {line["logger"] for line in found}
    assert {"uvicorn.error", "reranker.http.access", "reranker.scheduler.batcher"} <= loggers
    assert ("gunicorn.error" in loggers) == (command is FAKE)

    access = [line for line in found if line["logger"] == "reranker.http.access"]
    good = next(line for line in access if line["id"] == "good-1")
    assert (good["message"], good["method"], good["route"], good["status"]) == ("request", "POST", "/v1/rerank", 200)
    assert (good["documents"], good["tokens"], good["truncated"]) == (2, 22, 0)
    assert all(
        isinstance(good[name], float) and good[name] >= 0 for name in ("duration_ms", "queue_ms", "inference_ms")
    )
    assert "path" not in good
    assert {line["id"]: line["caller"] for line in access if "caller" in line} == {"named-1": "crawler"}
    bad = next(line for line in access if line["id"] == "bad-1")
    assert (bad["status"], bad["error_type"], bad["documents"]) == (500, "scoring_failed", 1)
    kinds = [line.get("error_type") for line in access if line["status"] >= 400 and line["route"] != "/health"]
    assert kinds == ["invalid_request", "malformed_body", "scoring_failed", "unauthorized", "not_found"]
    lost = next(line for line in access if line["status"] == 404)
    assert (lost["route"], lost["method"]) == ("other", "GET")
    assert lost["path"].startswith("/nothing")

    [failed] = [line for line in found if "exception" in line]
    assert failed["logger"] == "reranker.scheduler.passes"
    assert failed["exception"].startswith("Traceback (most recent call last):\n")
    assert failed["exception"].endswith("RuntimeError: a kernel failed")


@pytest.mark.slow
def test_the_real_models_libraries_write_json_too(start: Start) -> None:
    server = start(LOG_FORMAT="json", LOG_LEVEL="INFO", MAX_BATCH_TOKENS="1024")
    assert server.client.post("/v1/rerank", json={"query": "q", "documents": ["d"]}).status_code == 200
    server.client.close()
    server.stop()
    found = lines(server)
    assert any(line["logger"] == "reranker.engine.scorer" for line in found)
    assert [line["route"] for line in found if line["message"] == "request" and line["status"] == 200] == ["/v1/rerank"]


def test_libraries_with_handlers_of_their_own_are_back_under_ours() -> None:
    """transformers and huggingface_hub write plain lines to stderr by themselves."""
    from app import load_scorer
    from tests.conftest import DEMO

    load_scorer(Settings(model_name_or_path=str(DEMO), model_device="cpu", max_batch_tokens=1024))
    for name in ("transformers", "huggingface_hub"):
        logger = logging.getLogger(name)
        assert (logger.handlers, logger.propagate) == ([], True)


def test_text_and_json_tell_the_same_facts(start: Start) -> None:
    server = start(command=FAKE, token=TOKEN, ACCESS_TOKEN=f"{TOKEN}, crawler={CRAWLER}", LOG_FORMAT="%(message)s")
    body = {"query": QUERY, "documents": [DOCUMENT]}
    server.client.post("/v1/rerank", json=body, headers={"X-Request-Id": "text-1"})
    for i, token in enumerate((CRAWLER, f"crawler={CRAWLER}", f"crawler={TOKEN}")):
        headers = {"X-Request-Id": f"named-{i}", "Authorization": f"Bearer {token}"}
        server.client.post("/v1/rerank", json=body, headers=headers)
    server.client.get("/nothing", headers={"X-Request-Id": "text-2"})
    server.client.close()
    server.stop()
    log = server.log
    assert re.search(
        r"^POST /v1/rerank 200 \d+\.\d ms id=text-1 documents=1 tokens=11 truncated=0 "
        r"queue_ms=\d+\.\d inference_ms=\d+\.\d$",
        log,
        re.M,
    )
    missing = 'detail="there is no such path; see /docs for all paths"'
    assert re.search(rf"^GET /nothing 404 \d+\.\d ms id=text-2 error_type=not_found {missing}$", log, re.M)
    assert re.search(r"^POST /v1/rerank 200 \d+\.\d ms id=named-0 caller=crawler documents=1 tokens=11 ", log, re.M)
    assert re.search(r"^POST /v1/rerank 200 \d+\.\d ms id=named-1 caller=crawler documents=1 tokens=11 ", log, re.M)
    assert re.search(
        r'^POST /v1/rerank 401 \d+\.\d ms id=named-2 error_type=unauthorized detail="the token is wrong; ', log, re.M
    )
    assert "access tokens: 2; with a name: 1 (crawler)\n" in log
    assert CRAWLER not in log
    assert TOKEN not in log


def record(**fields: Any) -> logging.LogRecord:
    return logging.makeLogRecord({"name": "a.b", "levelname": "INFO", "msg": "%d of %s", "args": (1, "two")} | fields)


def test_a_line() -> None:
    line = json.loads(JsonFormatter().format(record(created=1700000000.25, process=7)))
    assert line == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "INFO",
        "logger": "a.b",
        "pid": 7,
        "message": "1 of two",
    }
    assert datetime.fromisoformat(line["time"]).timestamp() == 1700000000.25


@pytest.mark.parametrize(
    "text", ['quote " and \\', "line\nbreak\r\u2028", "\x00\x1b[31m", "汉字 \U0001f600", "lone \udcff"]
)
def test_any_message_is_one_line(text: str) -> None:
    line = JsonFormatter().format(record(msg=text, args=()))
    assert line.isascii()
    assert line.isprintable()
    assert json.loads(line)["message"] == text


def test_stack_and_values_without_a_json_form() -> None:
    line = json.loads(JsonFormatter().format(record(stack_info="Stack (most recent call last):", facts={"x": {1}})))
    assert (line["stack"], line["x"]) == ("Stack (most recent call last):", "{1}")


@pytest.mark.parametrize("text", ["json", "JSON", " json "])
def test_the_setting(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOG_FORMAT", text)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    before = dict(os.environ)
    try:
        settings = load_settings(tmp_path / ".env")
        assert settings.log_format == "json"
        assert log_config(settings)["formatters"]["default"] == {"()": "reranker.server.logs.JsonFormatter"}
        assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    finally:
        os.environ.clear()
        os.environ.update(before)


def test_warnings_are_log_lines(start: Start, tmp_path: Path) -> None:
    (tmp_path / "warning_app.py").write_text(
        "import warnings\nfrom tests.fake_app import app\nwarnings.warn('from somewhere', stacklevel=1)\n"
    )
    command = [*GUNICORN[:-1], "--pythonpath", str(tmp_path), "warning_app:app"]
    server = start(command=command, LOG_FORMAT="json")
    server.client.close()
    server.stop()
    [line] = [line for line in lines(server) if line["logger"] == "py.warnings"]
    assert "UserWarning: from somewhere" in line["message"]
