"""Ray: a cluster that is there or one on this machine, files scanned on it, parts scored on it."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import sys
import uuid
import warnings
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, replace
from typing import Any

# No report about this machine goes to Ray's makers.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray starts its workers with a nice value of 15. An actor is no background work: it feeds the device.
os.environ.setdefault("RAY_worker_niceness", "0")

import ray
import ray.data
from ray.exceptions import RayError, RayTaskError

from reranker.batch import parts
from reranker.batch.actor import Actor, Job
from reranker.batch.output import Record
from reranker.batch.parts import Part, Scan
from reranker.errors import CommandError, FailedError

# It calls a node's death a bug of Ray's, with a page of traceback; what becomes of it is said here.
logging.getLogger("ray.data.exceptions").setLevel(logging.CRITICAL)

_OBJECT_STORE = 256 << 20
"""Bytes; only parts' places and counts are kept in it."""
_CONNECT_SECONDS = 10.0
_ROUNDS = 4
"""How often in a row an actor may die before a part is finished."""


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
    try:
        found: list[Scan] = ray.get([task.remote(address, size) for address in files])
    except RayError as error:
        raise _failed(error) from None
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
        gpus = 0 if job.model.model_device == "cpu" else min(1.0, there.get("GPU", 0))
    if not gpus and job.model.model_device == "auto":
        job = replace(job, model=job.model.model_copy(update={"model_device": "cpu"}))
    least, most = pool or (max(1, int(there.get("GPU", 0) // gpus)) if gpus else 1,) * 2
    if cpus is None:
        widest = max((node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"]), default=1)
        cpus = 1 if gpus else max(1, int(min(there.get("CPU", 1) // most, widest)))
    waiting = {part.number: part for part in left}
    fruitless = 0
    while waiting:
        size = ray.data.ActorPoolStrategy(
            min_size=min(least, len(waiting)),
            max_size=min(most, len(waiting)),
            # Another part in an actor's own queue would wait there while a second actor is free.
            max_tasks_in_flight_per_actor=1,
        )
        before = len(waiting)
        try:
            with closing(_round(list(waiting.values()), job, size, gpus, cpus)) as rows:
                for row in rows:
                    if "error" in row:
                        raise FailedError(f"{row['error']}; run the same command again to continue")
                    del waiting[row["part"]]
                    yield Record(**row)
        except RayTaskError as error:
            raise _failed(error) from None
        except RayError as error:
            fruitless = fruitless + 1 if len(waiting) == before else 0
            if fruitless == _ROUNDS:
                part = min(waiting.values(), key=lambda part: part.number)
                raise FailedError(
                    f"actors died with {len(waiting)} parts in each of {_ROUNDS} rounds, the first from {part.place} "
                    f"of {part.file} ({_reason(error)}): Ray's logs say more; run the same command again to continue"
                ) from error
            print(f"{_reason(error)}; {len(waiting)} parts left: once more", file=sys.stderr, flush=True)
        else:
            if waiting:  # Ray Data ended without an error, but also without them
                raise FailedError(f"Ray lost {len(waiting)} parts; run the same command again to continue")


def _round(
    left: Sequence[Part], job: Job, size: ray.data.ActorPoolStrategy, gpus: float, cpus: int
) -> Generator[dict[str, Any], None, None]:
    """What actors answer, until the first of them dies.

    Ray Data could go on without it, but not always to an end: a part whose actor dies between its two answers (a block,
    then what is in it) is never done, an actor that is gone for good keeps its place in the pool, and a restart waits
    for ever for the node that is gone. So a death ends the round, and a new pool takes what is left.

    Raises:
        RayError: an actor died, or could not be had.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = True
    names = f"reranker-{uuid.uuid4().hex}"
    number = itertools.count()
    try:
        yield from (
            ray.data.from_items([asdict(part) for part in left], override_num_blocks=len(left))
            .map(
                Actor,
                fn_constructor_args=(job,),
                compute=size,
                num_cpus=cpus,
                num_gpus=gpus,
                max_restarts=0,
                max_task_retries=0,
                ray_remote_args_fn=lambda: {"name": f"{names}-{next(number)}"},
            )
            .iter_rows()
        )
    finally:
        # Ray Data only drops its handles, some of them in reference cycles. Until those are collected, which may be
        # never, the actors would hold the CPUs and GPUs that the next round waits for.
        for name in ray.util.list_named_actors():
            if name.startswith(names):
                with suppress(ValueError):  # it died meanwhile
                    ray.kill(ray.get_actor(name))


def _failed(error: RayError) -> Exception:
    """As a line, where it is one of those that happen without a fault of this program."""
    if not isinstance(error, RayTaskError):
        return FailedError(f"Ray gave up: {_reason(error)}; run the same command again to continue")
    cause: BaseException = error.cause
    if isinstance(cause, CommandError):
        return cause
    if "failed to import" in str(cause):
        return FailedError(
            f"the cluster has not this program, or not its packages ({str(error).strip().splitlines()[-1]}): let Ray "
            f"bring it, with `ray job submit --working-dir . -- python -m deploy.ray_batch ...`"
        )
    unexpected: Exception = error
    return unexpected


def _reason(error: RayError) -> str:
    """In a line."""
    lines = str(error).strip().splitlines() or [""]
    # What went wrong in a constructor stands below its traceback, and why an actor died below its name.
    why = lines[-1] if "creation task" in lines[0] else next((line for line in lines if " because " in line), lines[0])
    return f"{type(error).__name__}: {why.strip().rstrip('.')}"
