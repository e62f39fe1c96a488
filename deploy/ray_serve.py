"""The service on Ray Serve, for more than one machine: `serve run deploy/ray_serve.yaml`. See docs/ray.md.

Every replica builds the same application from the same settings as a gunicorn worker. Ray has the role of gunicorn: it
starts replicas, each with its own GPU, routes to the less busy one of two, adds replicas under load, replaces dead
ones, and drains those that it stops.
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

_SPARE_REQUESTS = 256
"""Requests above WORKER_CONNECTIONS that Ray passes to a replica, so that they get our 429 and do not wait in Ray."""

# Settings of Ray's processes, to be set before Ray starts on every node (docs/ray.md).
RAY_ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deploy.ray_proxy:middlewares",
    "RAY_SERVE_PROXY_PREFER_LOCAL_NODE_ROUTING": "0",  # else a node's replicas get all requests of its proxy
    "RAY_USAGE_STATS_ENABLED": "0",
}


class Replica:
    """A replica of the service, with the health check that Ray calls.

    `environment` has the settings. They are not in Ray's runtime_env, because Ray writes that into its logs.
    """

    app: FastAPI  # of serve.ingress, built in the replica

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        fleet.context = fleet.WorkerContext(siblings_serve=True)  # load first, within LOAD_TIMEOUT, then be ready

    async def check_health(self) -> None:
        """Raise the error of loading or using the model; Ray calls this every few seconds and replaces the replica."""
        from reranker.http.state import service_of

        if failure := service_of(self.app).batcher.failure:
            raise failure


def build(load: Callable[[], ScorerLike] | None = None) -> FastAPI:
    """Build the application of one replica, inside it. Arguments: see `create_app`."""
    from app import create_app
    from deploy.ray_metrics import share
    from reranker.http.state import service_of

    def failed(error: Exception) -> None:
        if service_of(application).batcher.scorer is None:  # never loaded: Ray gives up and shows the reason
            logger.critical("cannot serve: %s", error)
        else:  # Ray's checks are seconds apart, but it stops routing to an ended process immediately
            fleet.end_process(error)

    application = create_app(load_settings(), load, failed)
    share(service_of(application).metrics)
    return application


def deployment(settings: Settings, build: Callable[[], FastAPI]) -> serve.Deployment:
    """Return the application that `build` builds in every replica, with the settings as options of Ray."""
    decorate = serve.deployment(
        name="reranker",
        ray_actor_options={"num_cpus": 1, "num_gpus": 1 if _wants_gpu(settings) else 0},
        autoscaling_config={"min_replicas": 1, "max_replicas": 8, "target_ongoing_requests": 4},
        max_ongoing_requests=settings.worker_connections + _SPARE_REQUESTS,
        max_queued_requests=settings.worker_connections,  # while there is no replica
        health_check_period_s=5,
        graceful_shutdown_timeout_s=settings.request_timeout + 10,
    )
    return decorate(serve.ingress(build)(Replica))


def app(arguments: dict[str, str]) -> serve.Application:
    """Return the application that `serve run` and the config file name.

    `arguments` are settings by name; they override the environment and `.env`. Ray shows and logs them: no tokens here.

    Raises:
        SettingsError: a setting cannot be used.
    """
    for name, value in RAY_ENVIRONMENT.items():  # in time for the Ray that `serve run` starts
        os.environ.setdefault(name, value)
    try:
        for name, value in arguments.items():
            if name.upper() not in SETTINGS:
                similar = closest(name)
                raise SettingsError(f"{name} is not a setting" + (f"; did you mean {similar}?" if similar else ""))
            os.environ[name.upper()] = str(value)
        settings = load_settings()
        for warning in misspelt():
            logger.warning(warning)
        if settings.model_device.startswith("cuda:"):
            raise SettingsError(f"MODEL_DEVICE={settings.model_device} cannot be used; Ray chooses the GPU: write cuda")
        return deployment(settings, build).bind(environment())
    except SettingsError as error:
        if ray.is_initialized():  # in a task: Ray would not explain an exit
            raise
        sys.exit(error.report)


def environment() -> dict[str, str]:
    """Return the given settings, and variables of libraries in `.env`, such as HF_ENDPOINT."""
    names = {*SETTINGS, *read_env_file()}
    return {name: os.environ[name] for name in sorted(names) if name in os.environ}


def _wants_gpu(settings: Settings) -> bool:
    if settings.model_device != "auto":
        return settings.model_device == "cuda"
    if ray.is_initialized():
        resources: dict[str, Any] = ray.cluster_resources()
        return bool(resources.get("GPU"))
    import torch  # `serve run` has not started Ray yet: count this machine's

    return torch.cuda.is_available()  # the count may be NVML's, of devices that CUDA cannot use
