"""Ray: a cluster that is there or one on this machine, files scanned on it, parts scored on it."""

from __future__ import annotations

import gc
import os
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

# No report about this machine goes to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray starts its workers with a nice value of 15. An actor is no background work: it feeds the device.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from deploy.batch import parts
from deploy.batch.actor import Actor, Job
from deploy.batch.output import Record
from deploy.batch.parts import Part, Scan
from reranker.cli.errors import CommandError, FailedError

_OBJECT_STORE = 256 << 20
"""Bytes; only parts' places and counts are kept in it."""
_CONNECT_SECONDS = 10.0
_ROUNDS = 4
"""How often a part may be the one that an actor dies on before the batch fails."""


@contextmanager
def connected(address: str | None, *, verbose: bool) -> Iterator[None]:
    """Ray, for as long as the block runs; one that is connected already is used and left.

    Args:
        address: of a cluster, or `local`; None: RAY_ADDRESS, else local.
        verbose: whether what actors print is shown.

    Raises:
        FailedError: there is no cluster.
    """
    if ray.is_initialized():
        yield
        return
    where = address or os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False, "object_store_memory": _OBJECT_STORE} if where == "local" else {}
    try:
        host, _, port = where.rpartition(":")
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
        with warnings.catch_warnings():
            # It tells what a later Ray will do for actors without a GPU: here they are told to use the CPU.
            warnings.simplefilter("ignore", FutureWarning)
            ray.init(where, log_to_driver=verbose, logging_level="info" if verbose else "warning", **local)
    except (ConnectionError, RayError, OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FailedError(
            f"no Ray cluster at {where}: {reason[0].rstrip('.')}; start one, or --address local"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def scan(files: Sequence[str], size: int) -> dict[str, Scan]:
    """Read every file somewhere on the cluster.

    Raises:
        InputError: a file cannot be read or has not the columns of a batch.
    """
    task = ray.remote(parts.scan).options(scheduling_strategy="SPREAD")
    with _failing():
        found: list[Scan] = ray.get([task.remote(address, size) for address in files])
    return dict(zip(files, found, strict=True))


def score(
    left: Sequence[Part], job: Job, pool: tuple[int, int] | None, gpus: float | None, cpus: int | None
) -> Iterator[Record]:
    """Score parts on a pool of actors; a record for each, as they are finished.

    Args:
        left: what is to be done.
        job: what the actors have in common.
        pool: the least and the most actors.
        gpus: GPUs of each; 0: the CPU.
        cpus: CPUs of each.

    Raises:
        FailedError: a part cannot be scored, or an actor dies again and again.
    """
    there = ray.cluster_resources()
    if gpus is None:
        gpus = 0 if job.model["device"] == "cpu" else min(1.0, there.get("GPU", 0))
    if not gpus and job.model["device"] == "auto":
        job = replace(job, model=job.model | {"device": "cpu"})
    least, most = pool or (int(there.get("GPU", 0) // gpus) if gpus else 1,) * 2
    if cpus is None:
        widest = max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)
        cpus = 1 if gpus else max(1, int(min(there.get("CPU", 1) // most, widest)))
    waiting = {part.number: part for part in left}
    for _ in range(_ROUNDS):
        size = ray.data.ActorPoolStrategy(
            min_size=min(least, len(waiting)),
            max_size=min(most, len(waiting)),
            # Another part in an actor's own queue would wait there while a second actor is free.
            max_tasks_in_flight_per_actor=1,
        )
        for row in _round(list(waiting.values()), job, size, gpus, cpus):
            if "error" in row:
                raise FailedError(f"{row['error']}; run the same command again to continue")
            del waiting[row["part"]]
            yield Record(**row)
        if not waiting:
            return
        print(f"actors died with {len(waiting)} parts: once more", file=sys.stderr, flush=True)
        # Ray Data leaves a round's actors to reference counting, but in cycles: until those are collected they hold the
        # CPUs and GPUs that the next round's actors wait for, and a driver that only waits may never collect them.
        gc.collect()
    part = min(waiting.values(), key=lambda part: part.number)
    raise FailedError(
        f"actors died with {len(waiting)} parts in each of {_ROUNDS} rounds, the first from {part.place} of "
        f"{part.file}: Ray's logs say why; run the same command again to continue"
    )


def _round(
    left: Sequence[Part], job: Job, size: ray.data.ActorPoolStrategy, gpus: float, cpus: int
) -> Iterator[dict[str, Any]]:
    """What actors answer; nothing for a part whose actor died.

    Ray could give such a part to the same actor when it is alive again. Where a node is gone for good that is never: so
    the actor gets no second try, and the part goes to the next round.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = True
    context.max_errored_blocks = -1
    with _failing():
        yield from (
            ray.data.from_items([asdict(part) for part in left], override_num_blocks=len(left))
            .map(
                Actor,
                fn_constructor_args=(job,),
                compute=size,
                num_cpus=cpus,
                num_gpus=gpus,
                max_restarts=-1,
                max_task_retries=0,
            )
            .iter_rows()
        )


@contextmanager
def _failing() -> Iterator[None]:
    """Ray's errors as lines."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, CommandError):
            raise error.cause from None
        if "failed to import" in str(error.cause):
            raise FailedError(
                f"the cluster has not this program, or not its packages ({str(error).strip().splitlines()[-1]}): let "
                f"Ray bring it, with `ray job submit --working-dir . -- python -m deploy.ray_batch ...`"
            ) from None
        raise
    except RayError as error:
        reason = str(error).strip().splitlines() or [""]
        raise FailedError(
            f"Ray gave up ({type(error).__name__}: {reason[0]}); run the same command again to continue"
        ) from error
