"""A cluster of several nodes on this machine, a scorer whose device time is real waiting, and clients that count."""

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
# One such request fills a forward pass: a replica answers 1 / seconds of them a second, no more.
TOKENS = 15


def waiting(seconds: float, load_seconds: float = 0) -> Callable[[], FastAPI]:
    """An application whose forward passes take `seconds` of waiting, for one request each, and its load some more."""

    def make() -> FastAPI:
        def load() -> FakeScorer:
            time.sleep(load_seconds)
            return FakeScorer(seconds=seconds, max_batch_tokens=TOKENS)

        return build(load)

    return make


@contextmanager
def cluster(folder: str, port: int, nodes: int, replicas_per_node: int) -> Iterator[Cluster]:
    """A head that serves HTTP on `port` and holds no replica, and `nodes` machines with room for some each.

    CPUs are counted, not used: Ray places a replica on each. Args: `folder`: short, for Ray's sockets and logs.
    """
    # Its address is noted in the folder, for no other Ray to find. Nice workers would wait for whatever else runs here.
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
    """Put `replicas` of an application on the cluster, or update it; returns when all of them are ready."""
    settings = Settings(_env_file=None, model_device="cpu", request_timeout=20)
    options = {"num_replicas": replicas, "autoscaling_config": None, "health_check_period_s": 1} | options
    chosen = deployment(settings, make).options(**options)
    serve.run(chosen.bind(environment or {}), name="reranker", route_prefix="/")


def replicas(made: Cluster) -> list[psutil.Process]:
    """The processes of all replicas."""
    raylets = [info.process.pid for node in made.worker_nodes for info in node.all_processes["raylet"]]
    children = [child for pid in raylets for child in psutil.Process(pid).children()]
    return [child for child in children if child.cmdline()[0].startswith("ray::ServeReplica")]


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Wait for it.

    Raises:
        AssertionError: it did not come.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s; {serve.status()}"
        time.sleep(0.2)


def settled(count: int) -> None:
    """Wait until so many replicas run and Ray has no more to do; an ended one's process may stay for a while."""

    def is_so() -> bool:
        application = serve.status().applications["reranker"]
        states: dict[str, int] = application.deployments["reranker"].replica_states
        return bool(application.status == "RUNNING") and states == {"RUNNING": count}

    until(is_so)


@dataclass
class Seen:
    """What clients saw."""

    seconds: float = 0
    latencies: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """How often: "200", or the status with the error's type."""

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.kinds["200"] / self.seconds

    def quantile(self, q: float) -> float:
        """Of the latencies, in seconds."""
        return sorted(self.latencies)[int(q * (len(self.latencies) - 1))]


async def load(
    port: int, clients: int, seconds: float, warm_up: float = 0, over: Callable[[], bool] | None = None
) -> Seen:
    """`clients` that send their next request when the last one is answered, for `seconds`, or until it is `over`.

    In the first case what is answered in the warm-up or behind the end does not count; in the second, everything does.
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
    """What clients see during `seconds` and until the event is over, which comes after two of them."""

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
