"""A Ray cluster of several nodes on this machine, a scorer that sleeps, and clients that count their responses."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import ray
from fastapi import FastAPI
from ray import serve
from ray.cluster_utils import Cluster

from config import Settings
from deploy.ray_serve import RAY_ENVIRONMENT, build, deployment
from tests.fake import FakeScorer

BODY = {"query": "q", "documents": ["a b c d e"]}
# One such request fills a forward pass, so a replica scores at most 1 / `seconds` of them per second.
TOKENS = 15


def waiting(seconds: float, load_seconds: float = 0) -> Callable[[], FastAPI]:
    """Return a builder of an application that sleeps `seconds` per forward pass (one request), and while it loads."""

    def make() -> FastAPI:
        def load() -> FakeScorer:
            time.sleep(load_seconds)
            return FakeScorer(seconds=seconds, max_batch_tokens=TOKENS)

        return build(load)

    return make


@contextmanager
def cluster(folder: str, port: int, nodes: int, replicas_per_node: int) -> Iterator[Cluster]:
    """Start a head that serves HTTP on `port` and has no replica, and `nodes` nodes for replicas.

    A node has as many CPUs as replicas. Ray only counts them, and places one replica on each.

    Args:
        folder: for Ray's sockets and logs; its path must be short.
        port: of HTTP.
        nodes: number of nodes beside the head.
        replicas_per_node: room of each.
    """
    # Ray writes its address into the folder, so that no other Ray finds it. With a nice value, workers would wait for
    # other programs on this machine.
    os.environ |= RAY_ENVIRONMENT | {"RAY_TMPDIR": folder, "RAY_worker_niceness": "0"}
    (Path(folder) / "ray").mkdir(exist_ok=True)
    node = {"object_store_memory": 80 * 1024 * 1024, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={**node, "num_cpus": 0})
    try:
        for _ in range(nodes):
            made.add_node(**node, num_cpus=replicas_per_node, wait=False)
        made.wait_for_nodes()
        ray.init(made.address, namespace="serve", log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        yield made
    finally:
        if ray.is_initialized():
            serve.shutdown()
            ray.shutdown()
        made.shutdown()


def run(make: Callable[[], FastAPI], replicas: int, environment: dict[str, str] | None = None, **options: Any) -> None:
    """Deploy `replicas` of an application, or update it; return when all of them are ready."""
    settings = Settings(_env_file=None, model_device="cpu", request_timeout=20)
    options = {"num_replicas": replicas, "autoscaling_config": None, "health_check_period_s": 1} | options
    chosen = deployment(settings, make).options(**options)
    serve.run(chosen.bind(environment or {}), name="reranker", route_prefix="/")


def replicas(made: Cluster) -> list[psutil.Process]:
    """Return the processes of all replicas."""
    raylets = [info.process.pid for node in made.worker_nodes for info in node.all_processes["raylet"]]
    children = [child for pid in raylets for child in psutil.Process(pid).children()]
    return [child for child in children if child.cmdline()[0].startswith("ray::ServeReplica")]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait until a condition is true.

    Raises:
        AssertionError: it is still false after `seconds`.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s; {serve.status()}"
        time.sleep(0.2)


def settled(count: int) -> None:
    """Wait until `count` replicas run and Ray is idle; the processes of stopped replicas may still exist."""

    def is_so() -> bool:
        application = serve.status().applications["reranker"]
        states: dict[str, int] = application.deployments["reranker"].replica_states
        return bool(application.status == "RUNNING") and states == {"RUNNING": count}

    until(is_so)


@dataclass
class Seen:
    """Responses that the clients received."""

    seconds: float = 0
    latencies: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """Count by "200", or by status and error type."""

    @property
    def rate(self) -> float:
        """Successful responses per second."""
        return self.kinds["200"] / self.seconds

    def quantile(self, q: float) -> float:
        """Return a quantile of the latencies, in seconds."""
        return sorted(self.latencies)[int(q * (len(self.latencies) - 1))]


async def load(
    port: int, clients: int, seconds: float, warm_up: float = 0, over: Callable[[], bool] | None = None
) -> Seen:
    """Run `clients` that each have one request in flight, for `seconds` and until `over` returns True.

    Without `over`, responses during the warm-up and after the end are not counted.
    """
    seen = Seen(seconds)
    begin = time.monotonic() + warm_up
    end = begin + seconds

    async def client(http: httpx.AsyncClient) -> None:
        while (start := time.monotonic()) < end or (over is not None and not over()):
            answer = await http.post("/v1/rerank", json=BODY)
            if over is not None or begin <= time.monotonic() <= end:
                kind = "200" if answer.status_code == 200 else f"{answer.status_code} {_type(answer)}"
                seen.kinds[kind] += 1
                if answer.status_code == 200:
                    seen.latencies.append(time.monotonic() - start)
                else:
                    await asyncio.sleep(0.1)

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(
        base_url=f"http://127.0.0.1:{port}", limits=limits, timeout=60, trust_env=False
    ) as http:
        await asyncio.gather(*(client(http) for _ in range(clients)))
    return seen


def under_load(port: int, clients: int, seconds: float, event: Callable[[], object]) -> Seen:
    """Run clients for `seconds` and until the event has finished; it starts after two seconds."""

    def happen() -> None:
        time.sleep(2)
        event()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(happen)
        seen = asyncio.run(load(port, clients, seconds, over=done.done))
        done.result()
    return seen


def _type(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error_type"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.text[:80]!r}"
