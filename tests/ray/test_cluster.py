"""Several machines: the responses to users while replicas are added, killed, updated and lost."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest
import ray
from fastapi import FastAPI
from ray import serve
from ray.cluster_utils import Cluster

from config import Settings
from deploy.ray_serve import build, deployment
from reranker.errors import ModelLoadError
from tests.conftest import free_port
from tests.fake import FakeScorer
from tests.ray.cluster import BODY, TOKENS, cluster, load, replicas, run, settled, under_load, until, waiting

NODES = 3
CLIENTS = 12


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def nodes(ray_folder: str, port: int) -> Iterator[Cluster]:
    with cluster(ray_folder, port, NODES, 1) as made:
        run(waiting(0.2), NODES)
        yield made


def test_three_replicas_answer_what_three_can(port: int, nodes: Cluster) -> None:
    seen = asyncio.run(load(port, CLIENTS, 5, warm_up=1))
    assert set(seen.kinds) == {"200"}
    assert seen.rate > 2 * (1 / 0.2)  # the max of one replica; three reach 15 on an idle machine


def test_a_killed_replica_fails_what_it_had_and_nothing_else(port: int, nodes: Cluster) -> None:
    before = {process.pid for process in replicas(nodes)}
    assert len(before) == NODES
    victim = min(before)
    seen = under_load(port, CLIENTS, 6, lambda: os.kill(victim, signal.SIGKILL))
    assert set(seen.kinds) <= {"200", "503 not_ready"}
    assert 1 <= seen.kinds["503 not_ready"] <= CLIENTS
    assert seen.kinds["200"] > 20
    until(lambda: len(replicas(nodes)) == NODES)
    assert victim not in {process.pid for process in replicas(nodes)}


def test_a_rolling_update_fails_no_request(port: int, nodes: Cluster) -> None:
    settled(NODES)
    before = {process.pid for process in replicas(nodes)}
    seen = under_load(port, CLIENTS, 5, lambda: run(waiting(0.2, load_seconds=1), NODES, {"PORT": "1"}))
    assert set(seen.kinds) == {"200"}
    until(lambda: not before & {process.pid for process in replicas(nodes)})


def test_a_removed_node_fails_what_it_had_and_nothing_else(port: int, nodes: Cluster) -> None:
    settled(NODES)
    lost = min(nodes.worker_nodes, key=lambda node: str(node.unique_id))
    seen = under_load(port, CLIENTS, 6, lambda: nodes.remove_node(lost, allow_graceful=False))
    assert set(seen.kinds) <= {"200", "503 not_ready"}
    assert seen.kinds["503 not_ready"] <= CLIENTS
    assert seen.kinds["200"] > 20
    nodes.add_node(object_store_memory=80 * 1024 * 1024, include_dashboard=False, num_cpus=1)
    settled(NODES)


def test_a_full_queue_is_our_429(port: int, nodes: Cluster) -> None:
    run(waiting(2), 1, {"MAX_QUEUE_TOKENS": str(3 * TOKENS), "WORKER_CONNECTIONS": "8"})
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30) as client:
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(target=lambda: answers.append(client.post("/v1/rerank", json=BODY))) for _ in range(30)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert len(refused) >= 5  # of 25, if all arrive at the same time
    for answer in refused:
        assert answer.json()["error_type"] == "queue_full"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert len(answer.headers.get_list("x-request-id")) == 1


def test_clients_that_leave_take_their_work_along(port: int, nodes: Cluster) -> None:
    run(waiting(1), 1)
    url = f"http://127.0.0.1:{port}/v1/rerank"
    for _ in range(20):  # each needs the device for a second
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(url, json=BODY, trust_env=False, timeout=httpx.Timeout(5, read=0.1))
    start = time.monotonic()
    assert httpx.post(url, json=BODY, trust_env=False, timeout=30).status_code == 200
    assert time.monotonic() - start < 10  # three passes, not one for each of the twenty


def test_a_lost_device_is_told_and_its_replica_replaced(port: int, nodes: Cluster) -> None:
    def make() -> FastAPI:
        from tests.fake_app import Losing

        return build(Losing)

    run(make, 2, health_check_period_s=10)  # three failed checks would replace it much later
    before = {process.pid for process in replicas(nodes)}
    url = f"http://127.0.0.1:{port}/v1/rerank"
    lost = httpx.post(url, json={"query": "q", "documents": ["lost"]}, trust_env=False)
    assert (lost.status_code, lost.json()["error_type"]) == (503, "device_lost")
    assert lost.headers["retry-after"] == "10"
    until(lambda: len(before & {process.pid for process in replicas(nodes)}) == 1, 15)
    until(lambda: len(replicas(nodes)) == 2)
    assert httpx.post(url, json=BODY, trust_env=False, timeout=30).status_code == 200


def test_replicas_are_added_while_requests_gather(port: int, nodes: Cluster) -> None:
    settings = Settings(_env_file=None, model_device="cpu")
    scaled = deployment(settings, waiting(0.5)).options(
        autoscaling_config={
            "min_replicas": 1, "max_replicas": NODES, "target_ongoing_requests": 2, "upscale_delay_s": 1,
            "metrics_interval_s": 1, "look_back_period_s": 2,
        }
    )  # fmt: skip
    serve.run(scaled.bind({}), name="reranker", route_prefix="/")
    seen = under_load(port, CLIENTS, 5, lambda: until(lambda: len(replicas(nodes)) == NODES))
    assert set(seen.kinds) == {"200"}


def test_a_model_that_cannot_be_loaded_is_told(nodes: Cluster) -> None:
    def make() -> FastAPI:
        def fail() -> FakeScorer:
            raise ModelLoadError("the model folder ./models/none does not exist: download it first")

        return build(fail)

    settings = Settings(_env_file=None, model_device="cpu")
    broken = deployment(settings, make).options(
        num_replicas=1, autoscaling_config=None, ray_actor_options={"num_cpus": 0}
    )
    with pytest.raises(RuntimeError):
        serve.run(broken.bind({}), name="broken", route_prefix="/broken")
    status = serve.status().applications["broken"]
    assert status.status == "DEPLOY_FAILED"
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    assert any("download it first" in message for message in messages), messages
    serve.delete("broken")


def test_ray_shows_the_metrics_of_every_replica(port: int, nodes: Cluster) -> None:
    run(waiting(0), 2)
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        for _ in range(20):
            assert client.post("/v1/rerank", json=BODY).status_code == 200

        def counts() -> dict[str, float]:
            """Return the reranks of each replica, from the metrics of all nodes."""
            urls = [
                f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
                for node in ray.nodes()
                if node["Alive"]
            ]
            text = "".join(client.get(url).text for url in urls)
            found = re.findall(r"^ray_reranker_requests_total\{(.*)\} (\S+)$", text, re.M)
            labels = [(dict(re.findall(r'(\w+)="([^"]*)"', names)), float(count)) for names, count in found]
            return {names["replica"]: count for names, count in labels if names["route"] == "/v1/rerank"}

        for _ in range(6):
            time.sleep(12)  # Ray exports every 10 seconds, each value once
            seen = counts()
            if sum(seen.values()) == 20:
                break
        assert sum(seen.values()) == 20
        assert len(seen) == 2
