"""Faults of a device, in the forward pass of the real scorer inside a real gunicorn."""

from __future__ import annotations

import concurrent.futures
import re
import time

import httpx
import pytest

from tests.conftest import FAKE, GUNICORN, MAX_WAIT, Server, Start
from tests.faults.device_app import ERRORS, NAN
from tests.faults.raw import busy
from tests.faults.traffic import until
from tests.http.test_metrics import once, samples, value

DEVICE = [*GUNICORN[:-1], "tests.faults.device_app:app"]
TEXTS = [f"gzip compresses files, and this is part {i} of what there is to say about it" for i in range(60)]


def scores(server: Server, *documents: str) -> dict[int, float]:
    """By index."""
    answer = server.client.post("/v1/rerank", json={"query": "how to compress files", "documents": documents})
    assert answer.status_code == 200, answer.text
    return {row["index"]: row["score"] for row in answer.json()}


@pytest.fixture(scope="module")
def small(start: Start) -> Server:
    """Holds 1500 tokens, and has been asked for 100,000 in a pass."""
    return start(command=DEVICE, MAX_BATCH_TOKENS="100000", DEVICE_TOKENS="1500", REQUEST_TIMEOUT="60")


def test_out_of_memory_lowers_the_budget_and_changes_no_score(small: Server, server: Server) -> None:
    assert scores(small, *TEXTS) == pytest.approx(scores(server, *TEXTS), abs=1e-4)
    assert "out of memory at " in small.log
    before = small.log.count("out of memory at ")
    assert scores(small, *TEXTS) == pytest.approx(scores(server, *TEXTS), abs=1e-4)
    assert small.log.count("out of memory at ") == before, "learnt once"
    found = once(small, lambda s: value(s, "reranker_batch_token_budget") <= 1500)
    assert value(found, "reranker_batch_token_budget") >= 1000


def test_a_document_that_never_fits_is_told_and_harms_no_other(small: Server, server: Server) -> None:
    huge = {"query": "how to compress files", "documents": ["gzip compresses files " * 600]}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(small.client.post, "/v1/rerank", json=huge) for _ in range(2)]
        others = [pool.submit(scores, small, *TEXTS[:5]) for _ in range(2)]
        expected = scores(server, *TEXTS[:5])
        for answer in answers:
            told = answer.result()
            assert (told.status_code, told.json()["error_type"]) == (500, "out_of_memory")
            assert "MAX_SEQ_LENGTH" in told.json()["detail"]
        for other in others:
            assert other.result() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("harm", [NAN, "an unknown kernel"])
def test_a_request_that_the_model_fails_on_harms_no_other(small: Server, server: Server, harm: str) -> None:
    expected = scores(server, *TEXTS[:5])
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        bodies = [{"query": "q", "documents": [TEXTS[0], harm]}] * 3
        broken = [pool.submit(small.client.post, "/v1/rerank", json=body) for body in bodies]
        others = [pool.submit(scores, small, *TEXTS[:5]) for _ in range(3)]
        for answer in broken:
            assert (answer.result().status_code, answer.result().json()["error_type"]) == (500, "scoring_failed")
            assert "NaN" not in answer.result().text
        for other in others:
            assert other.result() == pytest.approx(expected, abs=1e-4)
    assert len(re.findall("Booting worker", small.log)) == 1


@pytest.mark.slow
def test_a_sticky_device_error_is_answered_and_the_worker_replaced(small: Server, server: Server) -> None:
    [sticky] = [text for text in ERRORS if "assert" in text]
    lost = small.client.post("/v1/rerank", json={"query": "q", "documents": [sticky]})
    assert (lost.status_code, lost.json()["error_type"]) == (503, "device_lost")
    assert int(lost.headers["retry-after"]) >= 1
    assert len(re.findall("cannot serve: the device failed", small.log)) == 1
    until(lambda: small.log.count("Booting worker") == 2, "the worker was replaced")
    small.wait_for("ok")
    assert scores(small, *TEXTS[:5]) == pytest.approx(scores(server, *TEXTS[:5]), abs=1e-4)
    assert value(samples(small), "reranker_errors_total", error_type="device_lost") == 1


@pytest.mark.slow
def test_a_device_that_hangs_is_given_up_after_twice_the_deadline(start: Start) -> None:
    server = start(command=FAKE, REQUEST_TIMEOUT="4")

    def ask(word: str) -> httpx.Response:
        return httpx.post(
            f"{server.client.base_url}/v1/rerank",
            json={"query": "q", "documents": [word]},
            timeout=MAX_WAIT,
            trust_env=False,
        )

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        first = pool.submit(ask, "hang")
        busy(server, 1)
        behind = [pool.submit(ask, "fish") for _ in range(2)]
        assert first.result().status_code == 504
        time.sleep(1)
        later = pool.submit(ask, "fish")  # the device is given up before its deadline
        assert [it.result().status_code for it in behind] == [504] * 2
        assert (later.result().status_code, later.result().json()["error_type"]) == (503, "device_lost")
        assert int(later.result().headers["retry-after"]) >= 1
    until(lambda: server.log.count("Booting worker") == 2, "the worker was replaced")
    server.wait_for("ok")
    assert ask("fish").status_code == 200
    assert "cannot serve: a forward pass did not end within 8 s" in server.log
