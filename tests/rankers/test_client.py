"""Scores from a running service: waiting, parts of a request, and responses of other services."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from reranker.errors import FailedError, InvalidRequestError
from reranker.rankers.client import Client
from reranker.rankers.ranker import Scored
from reranker.types import RerankRequest
from tests.cli.command import cli, read_lines, stub, write_lines
from tests.cli.test_rank import FAKE, url
from tests.conftest import Start


def test_the_wait_for_a_busy_service_is_bounded() -> None:
    busy = (503, {"Retry-After": "30"}, b"")
    with stub(busy) as service, pytest.raises(FailedError, match=r"not ready \(503\)"):
        list(Client(service.url, max_wait=5).rank_many([RerankRequest("q", ["d"])]))
    assert len(service.bodies) == 1


@pytest.mark.parametrize("url", ["http://[x", "http://a:b", "http://x y"])
def test_an_address_that_is_no_url_is_one_line(url: str) -> None:
    with pytest.raises(FailedError, match=rf"cannot reach {re.escape(url)}: .*; is the service running\?$"):
        Client(url)


def test_a_loading_service_is_waited_for(start: Start) -> None:
    loading = start(command=[*FAKE], wait="loading", FAKE_LOAD_SECONDS="3")
    (scored,) = Client(url(loading)).rank_many([RerankRequest("a b", ["a", "a b"])])
    assert isinstance(scored, Scored)
    assert scored.scores == pytest.approx([0.7310586, 0.8807971])


def test_a_redirect_is_not_followed_with_the_token() -> None:
    with stub() as other, stub((307, {"Location": other.url}, b"")) as service:
        with pytest.raises(FailedError, match="answers 307"):
            list(Client(service.url, "t").rank_many([RerankRequest("q", ["d"])]))
        assert other.bodies == []


@pytest.mark.parametrize("answer", [b"<html>", b"{}", b'[{"index": 7, "score": 1}]', b"[1]"])
def test_another_service_at_the_address(answer: bytes) -> None:
    with stub((200, {}, answer)) as service, pytest.raises(FailedError, match="does not answer like this service"):
        list(Client(service.url).rank_many([RerankRequest("q", ["d"])]))


def test_a_large_request_is_sent_in_parts_and_a_refused_one_spoils_no_other() -> None:
    requests = [RerankRequest("a", ["x"] * 600), RerankRequest("b", ["y" * 700_000] * 2)]
    with stub() as service:
        outcomes = list(Client(service.url).rank_many(requests))
    assert outcomes == [Scored([0.5] * 600, 0), Scored([0.5] * 2, 0)]
    sizes = sorted(len(body["documents"]) for body in service.bodies)
    assert sizes == [1, 1, 88, 256, 256]
    with stub((422, {}, b'{"detail": "query: must not be empty"}')) as service:
        first, second = Client(service.url).rank_many([RerankRequest("", ["x"]), RerankRequest("q", ["x"])])
    refused, fine = (first, second) if isinstance(first, InvalidRequestError) else (second, first)
    assert str(refused) == "query: must not be empty"
    assert fine == Scored([0.5], 0)


@pytest.mark.parametrize("count", [1, 6])
def test_as_many_requests_are_in_flight_as_asked_for(count: int, tmp_path: Path) -> None:
    """Each answer waits until `count` requests are there; one more at a time would be seen as well."""
    together, lock, open_now, most = threading.Barrier(count), threading.Lock(), 0, 0
    with stub() as service:
        answer = service.answer

        def wait(body: bytes, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
            nonlocal open_now, most
            with lock:
                open_now += 1
                most = max(most, open_now)
            together.wait(60)
            with lock:
                open_now -= 1
                return answer(body, authorization)

        service.answer = wait  # type: ignore[method-assign]
        rows = [{"query": f"q{i}", "document": "d"} for i in range(2 * count)]
        write_lines(tmp_path / "in.jsonl", rows)
        cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, "--concurrency", count, cwd=tmp_path)
    assert most == count
    assert len(read_lines(tmp_path / "out.jsonl")) == 2 * count


def test_facts_name_the_model_of_the_service(start: Start) -> None:
    server = start(command=[*FAKE])
    assert Client(url(server)).facts == {"url": url(server), "model": "fake"}
