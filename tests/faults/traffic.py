"""Clients that send requests all the time while a test injects a fault, and counts of their responses."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.conftest import MAX_WAIT, Server

BODY = {"query": "red fish", "documents": ["a red fish", "a blue bird", "red and blue"]}


def until(condition: Callable[[], bool], what: str, seconds: float = MAX_WAIT) -> None:
    """Wait for a condition; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def all_ready(server: Server, workers: int) -> None:
    """Wait until `workers` workers have loaded since the start."""
    until(lambda: server.log.count("ready after") >= workers, f"{workers} workers are ready")


class Traffic:
    """Ask from `keep_alive` clients that keep their connections and from `fresh` ones with one for each request.

    Attributes:
        kept, fresh: how often each thing happened to the clients of either kind: a status, "wrong" for a 200 with
            other scores, or the error's name (ValueError: not JSON).
        failed: the number of requests per client without a correct 200; clients without one are left out.
        slowest: seconds of the slowest answer.
    """

    def __init__(self, server: Server, *, keep_alive: int = 3, fresh: int = 3, pause: float = 0.05) -> None:
        self.server, self.pause = server, pause
        self.kept: Counter[object] = Counter()
        self.fresh: Counter[object] = Counter()
        self.failed: Counter[str] = Counter()
        self.slowest = 0.0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._kept) for _ in range(keep_alive)]
        self._threads += [threading.Thread(target=self._fresh) for _ in range(fresh)]

    @property
    def seen(self) -> Counter[object]:
        """The counts of all clients."""
        return self.kept + self.fresh

    def __enter__(self) -> Traffic:
        self.expected = self.server.client.post("/v1/rerank", json=BODY).json()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait(self, count: int, seconds: float = MAX_WAIT) -> None:
        """Wait until `count` more requests have been answered."""
        wanted, deadline = self.seen.total() + count, time.monotonic() + seconds
        while self.seen.total() < wanted:
            assert time.monotonic() < deadline, f"{self.seen} after {seconds} s"
            time.sleep(0.02)

    def _kept(self) -> None:
        with httpx.Client(base_url=self.server.client.base_url, timeout=MAX_WAIT, trust_env=False) as client:
            while not self._stop.wait(random.uniform(0, 2 * self.pause)):
                self._note(self.kept, lambda: _told(client.post("/v1/rerank", json=BODY)))

    def _fresh(self) -> None:
        while not self._stop.wait(random.uniform(0, 2 * self.pause)):
            self._note(self.fresh, self._once)

    def _once(self) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=MAX_WAIT)
        try:
            connection.request("POST", "/v1/rerank", json.dumps(BODY), {"Content-Type": "application/json"})
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def _note(self, seen: Counter[object], ask: Callable[[], tuple[int, Any]]) -> None:
        start = time.monotonic()
        told: object
        try:
            told, rows = ask()
            if told == 200 and not _equal(rows, self.expected):
                told = "wrong"
        except (OSError, http.client.HTTPException, httpx.TransportError, ValueError) as error:
            told = type(error).__name__
        with self._lock:
            seen[told] += 1
            if told != 200:
                self.failed[threading.current_thread().name] += 1
            self.slowest = max(self.slowest, time.monotonic() - start)


def _told(response: httpx.Response) -> tuple[int, Any]:
    return response.status_code, response.json()


def _equal(rows: list[dict[str, float]], expected: list[dict[str, float]]) -> bool:
    """The same documents in the same order with the same scores; a batch's other requests move the last digits."""
    return [row["index"] for row in rows] == [row["index"] for row in expected] and all(
        abs(row["score"] - other["score"]) < 1e-4 for row, other in zip(rows, expected, strict=True)
    )
