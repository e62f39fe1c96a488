"""benchmarks/overhead.py: its arithmetic, and that its client counts whole answers and accepts no other than a 200."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from benchmarks.launch import serve
from benchmarks.overhead import (
    CONTESTANTS,
    DOCUMENTS,
    TOKEN,
    WORDS,
    Round,
    Spent,
    content,
    load,
    post,
    promises,
    row,
    run,
)

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n[1,2]"


def test_rates_costs_and_ratios() -> None:
    ours = [
        Round(2.0, 1.0, 0.2, [0.001] * 1000),
        Round(2.0, 1.5, 0.2, [0.002] * 1000),
        Round(1.0, 1.2, 0.3, [0.003] * 1000),
    ]
    bare = [Round(2.0, 0.5, 0.2, [0.001] * 2000)] * 3
    # Rates 500, 500, 1000; costs 1, 1.5 and 1.2 ms against 0.25.
    assert row("x", 16, ours, bare) == ["x", "16", "500", "1.200", "4.80", "2.00", "2.00", "0.200"]


def test_what_is_outside_the_model_and_the_promises() -> None:
    spent = Spent(110.0, 60.0, 106.0, 54.0).since(Spent(10.0, 10.0, 9.0, 9.0))
    assert spent == Spent(100.0, 50.0, 97.0, 45.0)
    assert spent.outside == pytest.approx(0.03)
    assert spent.outside_processor == pytest.approx(0.1)
    fast, slow = [Round(1.0, 1.0, 0.1, [0.001] * 1500)], [Round(1.0, 1.0, 0.1, [0.001] * 1499)]
    assert [kept for _, kept in promises(fast, {1: spent})] == [True, True]
    late = Spent(100.0, 50.0, 94.0, 45.0)
    assert [kept for _, kept in promises(slow, {1: spent, 8: late})] == [False, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_answers_the_request(name: str) -> None:
    app, settings = CONTESTANTS[name]
    with serve(app, ACCESS_TOKEN=TOKEN, **settings) as service:
        assert run(service, post(content()), 2, 0.2).latencies


def test_the_request_has_ten_documents_of_ten_words() -> None:
    head, _, body = post(content()).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    assert [len(d.split()) for d in json.loads(body)["documents"]] == [WORDS] * DOCUMENTS


def loaded(pieces: list[bytes], clients: int) -> tuple[int, list[float]]:
    """Requests seen by a server that responds with these pieces, and latencies counted by the load generator."""
    seen, open_ = 0, set[asyncio.Task[Any]]()

    async def connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal seen
        task = asyncio.current_task()
        assert task is not None
        open_.add(task)
        while await reader.read(1000) == b"ask":
            seen += 1
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.001)
            if not pieces:
                break
        writer.close()
        await writer.wait_closed()

    async def main() -> list[float]:
        async with await asyncio.start_server(connection, "127.0.0.1", 0) as server:
            try:
                return await load(server.sockets[0].getsockname()[1], b"ask", clients, 0.05)
            finally:
                await asyncio.gather(*open_, return_exceptions=True)

    latencies = asyncio.run(main())
    return seen, latencies


def test_every_whole_answer_is_counted_once() -> None:
    seen, latencies = loaded([OK[:20], OK[20:41], OK[41:]], clients=2)
    assert len(latencies) == seen >= 2


@pytest.mark.parametrize("pieces", [[OK.replace(b"200", b"429")], [OK.replace(b"Content-Length", b"X")], []])
def test_anything_but_a_whole_200_is_an_error(pieces: list[bytes]) -> None:
    with pytest.raises(RuntimeError):
        loaded(pieces, clients=1)
