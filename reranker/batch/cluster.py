"""Ray: connect to a cluster or start one on this machine, scan files on it, score parts on it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import socket
import sys
import uuid
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

# Reports of usage to Ray's makers are off.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray starts its workers with a nice value of 15, but an actor is no background work: it feeds the device.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from reranker.batch import parts
from reranker.batch.actor import Actor, ActorConfig
from reranker.batch.output import PartRecord
from reranker.batch.parts import Part, Scan
from reranker.errors import CommandError, FailedError
from reranker.notes import Notes
from reranker.terminal import note

# It reports a dead node as a bug of Ray with a page of traceback; `score` reports it in one line.
logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)

_OBJECT_STORE = 256 << 20
"""Bytes; it only holds the places of parts and their records."""
_CONNECT_SECONDS = 10.0
_MAX_FRUITLESS_ROUNDS = 4
"""Consecutive rounds in which an actor dies before any part is finished."""
_AGAIN = "run the same command again to continue"


@dataclass(frozen=True, slots=True)
class Pool:
    """Min and max number of actors, and the GPUs and CPUs of each; None: by the resources of the cluster."""

    size: tuple[int, int] | None = None
    gpus: float | None = None
    """0: score on the CPU."""
    cpus: int | None = None


@contextmanager
def connected(address: str | None, *, verbose: bool) -> Iterator[None]:
    """Connect to Ray in the block; `address` is a cluster or `local` (None: RAY_ADDRESS, else local).

    Raises:
        FailedError: there is no cluster.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if target == "local" else {}
    try:
        host, _, port = target.rpartition(":")
        if host and port.isdecimal():  # Ray itself would retry for minutes
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        with warnings.catch_warnings():
            # About a later default for actors without a GPU; `score` gives them device=cpu.
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(target, log_to_driver=verbose, logging_level="info" if verbose else "warning", **local)
    except (ConnectionError, RayError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        cause = f"no Ray cluster at {target}: {reason[0].rstrip('.')}"
        raise FailedError(f"{cause}; start one, or --address local") from error
    try:
        yield
    finally:
        ray.shutdown()


def scan(files: Sequence[str], size: int) -> dict[str, Scan]:
    """Scan every file on some node; see `parts.scan`."""
    task = ray.remote(parts.scan).options(scheduling_strategy="SPREAD")
    try:
        scans: list[Scan] = ray.get([task.remote(address, size) for address in files])
    except RayError as error:
        raise _plain(error) from None
    return dict(zip(files, scans, strict=True))


def score(unfinished: Sequence[Part], config: ActorConfig, pool: Pool) -> Iterator[PartRecord]:
    """Score parts on a pool of actors; yield the record of each when it is finished.

    Raises:
        FailedError: a part cannot be scored, or actors die repeatedly.
    """
    size, resources = _resources(pool, config.model.model_device)
    if not resources["num_gpus"] and config.model.model_device == "auto":
        config = replace(config, model=config.model.model_copy(update={"model_device": "cpu"}))
    pending = {part.number: part for part in unfinished}
    notes, fruitless = Notes(note), 0
    while pending:
        before = len(pending)
        try:
            with closing(_round(list(pending.values()), config, size, resources)) as rows:
                for row in rows:
                    if "error" in row:
                        raise FailedError(f"{row['error']}; {_AGAIN}")
                    for text, place in json.loads(row.pop("notes")).items():
                        notes.add([text], place)
                    del pending[row["part"]]
                    yield PartRecord(**row)
        except RayTaskError as error:
            raise _plain(error) from None
        except RayError as error:
            fruitless = fruitless + 1 if len(pending) == before else 0
            if fruitless == _MAX_FRUITLESS_ROUNDS:
                part = pending[min(pending)]
                cause = f"actors died with {len(pending)} parts in each of {fruitless} rounds"
                place = f"the first from {part.unit} {part.first} of {part.file} ({_reason(error)})"
                raise FailedError(f"{cause}, {place}; see Ray's logs, and {_AGAIN}") from error
            print(f"{_reason(error)}; {len(pending)} parts left: starting new actors", file=sys.stderr, flush=True)
        else:
            if pending:  # Ray Data ended without an error
                raise FailedError(f"Ray lost {len(pending)} parts; {_AGAIN}")


def _round(
    unfinished: Sequence[Part], config: ActorConfig, size: tuple[int, int], resources: dict[str, float]
) -> Generator[dict[str, Any], None, None]:
    """Yield the results of actors until the first actor dies.

    Ray Data could continue without it, but would not always end: a part whose actor dies between its two messages (a
    block, then its metadata) is never done, a dead actor keeps its place in the pool, and a restart waits forever for a
    node that is gone. So a death ends the round with a RayError, and a new pool takes the pending parts.
    """
    ray.data.DataContext.get_current().enable_progress_bars = True
    actors = ray.data.ActorPoolStrategy(
        min_size=min(size[0], len(unfinished)),
        max_size=min(size[1], len(unfinished)),
        # A second part in the queue of one actor would wait while another actor is idle.
        max_tasks_in_flight_per_actor=1,
    )
    names = f"reranker-{uuid.uuid4().hex}"
    number = itertools.count()
    try:
        yield from (
            ray.data.from_items([asdict(part) for part in unfinished], override_num_blocks=len(unfinished))
            .map(
                Actor,
                fn_constructor_args=(config,),
                compute=actors,
                max_restarts=0,
                max_task_retries=0,
                ray_remote_args_fn=lambda: {"name": f"{names}-{next(number)}"},
                **resources,
            )
            .iter_rows()
        )
    finally:
        # Ray Data only drops its handles, some of them in reference cycles. Until those are collected, perhaps never,
        # the actors would keep the CPUs and GPUs that the next round needs.
        for name in ray.util.list_named_actors():
            if name.startswith(names):
                with suppress(ValueError):  # it died meanwhile
                    ray.kill(ray.get_actor(name))


def _resources(pool: Pool, device: str) -> tuple[tuple[int, int], dict[str, float]]:
    """Return the size of a pool, and the resources of each actor as keywords of Ray; docs/ray-batch.md has defaults."""
    total = ray.cluster_resources()
    gpus = pool.gpus
    if gpus is None:
        gpus = 0 if device == "cpu" else min(1.0, total.get("GPU", 0))
    size = pool.size or (max(1, int(total.get("GPU", 0) // gpus)) if gpus else 1,) * 2
    cpus = pool.cpus or 1
    if pool.cpus is None and not gpus:
        widest = max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)
        cpus = max(1, int(min(total.get("CPU", 1) // size[1], widest)))
    return size, {"num_gpus": gpus, "num_cpus": cpus}


def _plain(error: RayError) -> Exception:
    """Return an error of one line, unless a bug of this program caused it."""
    if not isinstance(error, RayTaskError):
        return FailedError(f"Ray gave up: {_reason(error)}; {_AGAIN}")
    cause: BaseException = error.cause
    if isinstance(cause, CommandError):
        return cause
    if "failed to import" in str(cause):
        reason = f"the cluster lacks this program or its packages ({str(error).strip().splitlines()[-1]})"
        command = "ray job submit --working-dir . -- python -m deploy.ray_batch ..."
        return FailedError(f"{reason}: let Ray bring it, with `{command}`")
    unexpected: Exception = error
    return unexpected


def _reason(error: RayError) -> str:
    """Return the one line of an error of Ray that names the cause."""
    lines = str(error).strip().splitlines() or [""]
    # An error in a constructor stands below its traceback; the cause of an actor's death below its name.
    why = lines[-1] if "creation task" in lines[0] else next((line for line in lines if " because " in line), lines[0])
    return f"{type(error).__name__}: {why.strip().rstrip('.')}"
