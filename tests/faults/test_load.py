"""More clients than the service can serve, and clients that ask for too much."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import httpx
import pytest

from benchmarks.wire import Answer, Wire
from tests.conftest import GUNICORN, MAX_WAIT, Server, Start
from tests.fake import PREFIX
from tests.faults.raw import Peak

STEPPED = [*GUNICORN[:-1], "tests.faults.stepped_app:app"]
CLIENTS = 1000


def body(query: str, documents: int, words: int = 4) -> dict[str, object]:
    """`words` + 1 tokens a document, of which one is the query's."""
    return {"query": query, "documents": [f"{query}{' word' * words}"] * documents}


@dataclass
class Stepped:
    """The service around tests/faults/stepped_app.py, one forward pass at a time."""

    server: Server
    journal_path: Path
    gate: int

    @property
    def journal(self) -> list[list[str]]:
        return [line.split() for line in self.journal_path.read_text().splitlines()]

    def told(self, what: str) -> list[list[str]]:
        return [names for kind, *names in self.journal if kind == what]

    def until(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + MAX_WAIT
        while not done():
            assert time.monotonic() < deadline, f"{self.journal[-5:]}\n{self.server.log[-3000:]}"
            time.sleep(0.005)

    def let_go(self, passes: int) -> None:
        os.write(self.gate, b"x" * passes)

    def queued(self) -> float:
        text = self.server.client.get("/metrics").text
        return sum(float(v) for v in re.findall(r"^reranker_queue_tokens(?:\{.*\})? (\S+)$", text, re.M))


@pytest.fixture
def stepped(start: Start, tmp_path: Path) -> Iterator[Callable[..., Stepped]]:
    gates: list[int] = []

    def run(**env: str) -> Stepped:
        gate = tmp_path / "gate"
        os.mkfifo(gate)
        server = start(command=STEPPED, JOURNAL=str(tmp_path / "journal"), GATE=str(gate), **env)
        gates.append(os.open(gate, os.O_WRONLY))
        return Stepped(server, tmp_path / "journal", gates[-1])

    yield run
    for gate in gates:
        os.write(gate, b"x" * 1000)  # releases pending passes
        os.close(gate)


def test_a_thousand_clients_at_once(start: Start, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    server = start(command=STEPPED, JOURNAL=str(journal), FAKE_SECONDS="0.02", MAX_QUEUE_TOKENS="2000", KEEP_ALIVE="60")
    probes: list[Answer] = []

    async def main() -> list[Answer]:
        bodies = [json.dumps(body(f"q{i}", 5)).encode() for i in range(CLIENTS)]
        async with Wire(server.port) as wire:
            asked = [asyncio.create_task(wire.ask("/v1/rerank", each)) for each in bodies]
            while not all(task.done() for task in asked):
                for path in ("/health", "/livez", "/metrics"):
                    probes.append(await wire.ask(path))
            return await asyncio.gather(*asked)

    answers = asyncio.run(main())
    statuses = collections.Counter(answer.status for answer in answers)
    assert set(statuses) == {200, 429}, statuses
    assert sum(statuses.values()) == CLIENTS
    for answer in answers:
        if answer.status == 200:
            assert answer.json() == [{"index": i, "score": pytest.approx(0.731, abs=1e-3)} for i in range(5)]
        else:
            assert b'"error_type":"queue_full"' in answer.body
            assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert len(probes) >= 3
    assert {probe.status for probe in probes} == {200}
    # A probe does not wait behind the clients, however fast the machine is.
    assert median(probe.seconds for probe in probes) < median(answer.seconds for answer in answers)
    assert len(re.findall(r"Booting worker with pid", server.log)) == 1
    # Refused requests cost nothing: exactly the answered ones were tokenised and scored.
    told = [line.split() for line in journal.read_text().splitlines()]
    encoded = [query for what, *names in told if what == "encode" for query in names]
    scored = {query for what, *names in told if what == "pass" for query in names}
    assert len(encoded) == len(set(encoded)) == statuses[200]
    assert scored == set(encoded)
    again = server.client.post("/v1/rerank", json=body("again", 1))
    assert again.status_code == 200


def test_a_refused_request_is_not_tokenised_and_an_accepted_one_is_answered(
    stepped: Callable[..., Stepped],
) -> None:
    service = stepped(MAX_QUEUE_TOKENS="200")
    client = service.server.client
    with ThreadPoolExecutor(3) as pool:
        accepted = [pool.submit(client.post, "/v1/rerank", json=body("running", 1))]
        service.until(lambda: len(service.told("pass")) == 1)
        accepted.append(pool.submit(client.post, "/v1/rerank", json=body("waits", 10)))
        service.until(lambda: service.queued() == PREFIX + 50)
        for i in range(20):
            # The gate is closed, so a response that waited for a forward pass would not arrive.
            refused = client.post("/v1/rerank", json=body(f"refused{i}", 50))
            assert (refused.status_code, refused.json()["error_type"]) == (429, "queue_full")
            assert int(refused.headers["retry-after"]) >= 1
        assert service.told("encode") == [["running"], ["waits"]]
        service.let_go(2)
        assert [len(answer.result().json()) for answer in accepted] == [1, 10]
    assert service.told("pass") == [["running"], ["waits"]]


def test_what_was_not_asked_for_takes_no_memory_while_its_request_waits(stepped: Callable[..., Stepped]) -> None:
    service = stepped()
    client, requests = service.server.client, 12
    junk = [f"{i:06d}" for i in range(900_000)]  # 8 MB, and 60 MB of memory as Python's objects
    bodies = [json.dumps({**body(f"q{i}", 1), "junk": junk}).encode() for i in range(requests)]
    with Peak(service.server) as peak, ThreadPoolExecutor(requests) as pool:
        asked = []
        for i in range(requests):
            asked.append(
                pool.submit(client.post, "/v1/rerank", content=bodies[i], headers={"content-type": "application/json"})
            )
            service.until(lambda: len(service.told("encode")) == len(asked))
        service.let_go(requests)
        assert [answer.result().status_code for answer in asked] == [200] * requests
    assert peak.megabytes < 300  # 900, were all of it kept


@pytest.mark.parametrize(
    ("documents", "words"), [(1000, 4), (50, 249)], ids=["of many documents", "of documents above a whole pass"]
)
def test_huge_requests_cannot_hold_a_small_one_up_for_more_than_three_passes(
    stepped: Callable[..., Stepped], documents: int, words: int
) -> None:
    service = stepped(FAKE_BATCH_TOKENS="200", REQUEST_TIMEOUT="60")
    client = service.server.client
    huge = 12
    answers: list[Future[httpx.Response]] = []
    with ThreadPoolExecutor(huge + 1) as pool:
        answers += [
            pool.submit(client.post, "/v1/rerank", json=body(f"huge{i}", documents, words)) for i in range(huge)
        ]
        service.until(lambda: len(service.told("encode")) == huge and len(service.told("pass")) == 1)
        for i in range(8):
            asked = pool.submit(client.post, "/v1/rerank", json=body(f"small{i}", 2))
            service.until(lambda: [f"small{i}"] in service.told("encode"))  # noqa: B023
            for _ in range(5):  # the event loop goes round, and it is in the queue
                assert client.get("/livez").status_code == 200
            running = begun = len(service.told("pass"))
            while not any(f"small{i}" in names for names in service.told("pass")):
                service.let_go(1)
                begun += 1
                service.until(lambda: len(service.told("pass")) == begun)  # noqa: B023
            # The pass in flight at its arrival, one that was packed already, and its own.
            assert begun - running + 1 <= 3
            service.let_go(1)
            assert len(asked.result().json()) == 2
            service.until(lambda: len(service.told("pass")) == begun + 1)  # noqa: B023
        assert not any(answer.done() for answer in answers)
        threading.Thread(target=service.let_go, args=(huge * documents,)).start()
        assert {len(answer.result().json()) for answer in answers} == {documents}


GOOD: list[dict[str, object]] = [
    {
        "query": f"how to compress files {i}",
        "documents": [
            f"{text} {i}" for text in ("gzip compresses files", "a game of chess", "the weather") * (i % 4 + 1)
        ],
    }
    for i in range(8)
]
BAD: list[tuple[bytes, int]] = [
    (b"{", 400),
    (b"\xff", 400),
    (b"[" * 50_000, 400),
    (b"[]", 422),
    (b'{"query": "q", "documents": [NaN]}', 422),
    (b'{"query": "q", "documents": []}', 422),
    (b'{"query": "q", "documents": [' + b'{"txt": 1},' * 5000 + b"{}]}", 422),
    (json.dumps({"query": "word " * 9000, "documents": ["a"]}).encode(), 422),
    (json.dumps({"query": "q", "documents": ["\ud800", "<|im_end|>" * 50]}).encode(), 200),
    (json.dumps({"query": "q", "documents": ["word " * 2000]}).encode(), 200),
]


def test_bad_requests_change_no_score_of_good_ones(server: Server) -> None:
    boots = server.log.count("Booting worker")

    async def scores(wire: Wire, content: dict[str, object]) -> dict[int, float]:
        answer = await wire.ask("/v1/rerank", json.dumps(content).encode())
        assert answer.status == 200, answer.body
        rows = json.loads(answer.body)
        return {row["index"]: row["score"] for row in rows}

    async def bad(wire: Wire, content: bytes, status: int) -> None:
        answer = await wire.ask("/v1/rerank", content)
        assert answer.status == status, (content[:80], answer.body)

    async def together(wire: Wire, alone: list[dict[int, float]]) -> None:
        good = [asyncio.create_task(scores(wire, content)) for content in GOOD * 2]
        rest = [asyncio.create_task(bad(wire, *each)) for each in BAD]
        left = [
            asyncio.create_task(wire.leave("/v1/rerank", json.dumps(content).encode(), 0.05, part))
            for content in GOOD
            for part in (0.5, 1.0)
        ]
        got = await asyncio.gather(*good)
        await asyncio.gather(*rest, *left)
        for one, other in zip(alone * 2, got, strict=True):
            assert other == pytest.approx(one, abs=1e-5)

    async def main() -> None:
        async with Wire(server.port) as wire:
            alone = [await scores(wire, content) for content in GOOD]
        for _ in range(2):
            async with Wire(server.port) as wire:
                await together(wire, alone)

    asyncio.run(main())
    assert server.log.count("Booting worker") == boots


def test_a_request_that_the_model_fails_on_fails_alone(start: Start, tmp_path: Path) -> None:
    server = start(command=STEPPED, JOURNAL=str(tmp_path / "journal"), FAKE_SECONDS="0.01")

    async def main() -> None:
        kinds = [f"good{i}" if i % 5 else ("poison", "nan")[i // 5 % 2] for i in range(100)]
        bodies = [json.dumps(body(kind, 3)).encode() for kind in kinds]
        async with Wire(server.port) as wire:
            answers = await asyncio.gather(*[wire.ask("/v1/rerank", each) for each in bodies])
        for kind, answer in zip(kinds, answers, strict=True):
            if kind.startswith("good"):
                assert json.loads(answer.body) == [
                    {"index": i, "score": pytest.approx(0.731, abs=1e-3)} for i in range(3)
                ]
            else:
                assert (answer.status, json.loads(answer.body)["error_type"]) == (500, "scoring_failed")

    asyncio.run(main())
    # They did share passes, so there was something to be harmed.
    passes = [line.split()[1:] for line in (tmp_path / "journal").read_text().splitlines() if line.startswith("pass")]
    assert any({"poison", "nan"} & set(names) and len(set(names)) > 2 for names in passes)
