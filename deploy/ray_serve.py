"""The service on Ray Serve, for more than one machine: `serve run deploy/ray_serve.yaml`. See docs/ray.md.

Every replica builds the same application from the same settings as a gunicorn worker does. What gunicorn is there, Ray
is here: it starts replicas, each with its GPU, routes to the one with fewer requests in progress of two, adds replicas
while requests gather, replaces those that die, and lets one that it stops finish first.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray import serve

from config import Settings, SettingsError, load_settings, misspelt
from reranker.environment import SETTINGS, closest, read_env_file
from reranker.server import fleet

if TYPE_CHECKING:
    from fastapi import FastAPI

    from reranker.scheduler.compute import ScorerLike

logger = logging.getLogger("reranker")

# Requests above WORKER_CONNECTIONS that a replica is still sent, so that they get our own 429 and not Ray's patience.
_SPARE_REQUESTS = 256

# Ray's own switches, read by its processes: set before Ray starts, on every node (docs/ray.md).
RAY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray_proxy:middlewares",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # else a node's own replicas get all that its proxy receives
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Replica:
    """What Ray asks of a replica beside its requests.

    Args:
        environment: the settings, as variables. Not Ray's runtime_env, which Ray writes into its logs.
    """

    app: FastAPI  # of serve.ingress, made in the replica

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        fleet.context = fleet.WorkerContext(siblings_serve=True)  # load first, within LOAD_TIMEOUT, then be ready

    async def check_health(self) -> None:
        """Ray asks when the replica is built, then every few seconds; it replaces one that raises.

        Raises:
            Exception: why the model was not loaded or cannot be used any more.
        """
        failure: Exception | None = self.app.state.failure
        if failure is not None:
            raise failure


def build(load: Callable[[], ScorerLike] | None = None) -> FastAPI:
    """The application of one replica, made inside it. Arguments: see `create_app`."""
    from app import create_app
    from deploy.ray_metrics import share
    from reranker.http.state import service_of

    def failed(error: Exception) -> None:
        made.state.failure = error
        if service_of(made).batcher.scorer is None:  # never loaded: Ray gives up on this replica and shows the reason
            logger.critical("cannot serve: %s", error)
        else:  # Ray's checks come seconds apart; a process that ends is left out of the routing at once
            fleet.end_process(error)

    made = create_app(load_settings(), load, failed)
    made.state.failure = None
    share(service_of(made).metrics)
    return made


def deployment(settings: Settings, build: Callable[[], FastAPI]) -> serve.Deployment:
    """What the settings say to Ray, around the application that `build` makes in every replica."""
    decorate = serve.deployment(
        name="reranker",
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if _wants_gpu(settings) else 0},
        autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 4},
        max_ongoing_requests=settings.worker_connections + _SPARE_REQUESTS,
        max_queued_requests=settings.worker_connections,  # while there is no replica at all
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.request_timeout + 10,
    )
    return decorate(serve.ingress(build)(Replica))


def app(arguments: dict[str, str]) -> serve.Application:
    """What `serve run` and the config file name.

    Args:
        arguments: settings by their names, which win over the environment and `.env`. Ray shows and logs them, so
            tokens do not belong here.

    Raises:
        SettingsError: a setting cannot be used.
    """
    for name, value in RAY_ENVIRONMENT.items():  # in time for a Ray that `serve run` starts itself
        os.environ.setdefault(name, value)
    try:
        for name, value in arguments.items():
            if name.upper() not in SETTINGS:
                meant = closest(name)
                raise SettingsError(f"{name} is not a setting" + (f"; did you mean {meant}?" if meant else ""))
            os.environ[name.upper()] = str(value)
        settings = load_settings()
        for warning in misspelt():
            logger.warning(warning)
        if settings.model_device.startswith("cuda:"):
            raise SettingsError(f"MODEL_DEVICE={settings.model_device} cannot be used; Ray chooses the GPU: say cuda")
        return deployment(settings, build).bind(environment())
    except SettingsError as error:
        if ray.is_initialized():  # in a task, whose end Ray would not explain
            raise
        sys.exit(f"error: {error}")


def environment() -> dict[str, str]:
    """Return the settings that are set, and the variables of libraries in `.env`, such as HF_ENDPOINT."""
    names = {*SETTINGS, *read_env_file()}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def _wants_gpu(settings: Settings) -> bool:
    if settings.model_device != "auto":
        return settings.model_device == "cuda"
    if ray.is_initialized():
        resources: dict[str, Any] = ray.cluster_resources()
        return bool(resources.get("GPU"))
    import torch  # `serve run` has not started Ray yet: what this machine has

    return torch.cuda.device_count() > 0
