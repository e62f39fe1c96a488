"""gunicorn's settings, all derived from config.py: `gunicorn -c gunicorn.conf.py app:app`."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from config import OWN_WORKER_CLASS, SettingsError, load_settings, log_config
from reranker.cgroup import allowed, cores
from reranker.environment import shorten
from reranker.server import address, folder
from reranker.server.handover import Handover

try:
    _settings = load_settings()
except SettingsError as error:
    sys.exit(f"error: {error}")


def count_gpus() -> int:
    """CUDA devices that this service may use, asked in a process of its own: the master must never hold a GPU."""
    question = "import torch; print(torch.cuda.device_count())"
    asked = subprocess.run([sys.executable, "-c", question], capture_output=True, text=True, timeout=300, check=False)
    return int(asked.stdout.strip() or 0) if asked.returncode == 0 else 0


_pinned = _settings.model_device in ("auto", "cuda") and _settings.workers != 1
_gpus = count_gpus() if _pinned else 0
_visible = [device.strip() for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device.strip()]
_devices = (_visible or [str(i) for i in range(_gpus)]) if _gpus else []  # each slot has the one of its turn

bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.workers or max(1, _gpus)
worker_class = OWN_WORKER_CLASS
worker_connections = _settings.worker_connections
timeout = _settings.timeout  # a heartbeat: the event loop never computes, so it only misses when it hangs
graceful_timeout = int(_settings.request_timeout) + 10
keepalive = _settings.keep_alive
preload_app = False  # every worker loads its own model, after the fork
max_requests = 0  # recycling a worker would load the model again
control_socket_disable = True
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
accesslog = None  # the service writes its own line, without the token
logconfig_dict = log_config(_settings)

_SUFFIX, _FOLDER = "RERANKER_SUFFIX", "RERANKER_METRICS"  # what a master tells the next one, through the environment
_NEXT = "b"  # every second generation's files

if workers > 1 or cores() < allowed():  # else the one worker starts as many threads as torch finds right
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))


def _check_addresses(server: Any) -> None:
    """End with one line if an address cannot be bound; gunicorn would try five times and not name the setting."""
    inherited = server.master_pid or os.environ.get("LISTEN_PID") == str(os.getpid())  # SIGUSR2, systemd
    if inherited or any(isinstance(one, int) for one in server.cfg.address):  # fd://N
        return
    if server.cfg.bind == [bind]:
        given = [f"{n.upper()}={shorten(str(getattr(_settings, n)))} ({_settings.source(n)})" for n in ("host", "port")]
    else:
        given = [f"--bind {shorten(' '.join(server.cfg.bind))} (the command line)"] * 2
    for host, port in (one for one in server.cfg.address if isinstance(one, tuple)):
        error = address.bind_error(host, port, reuse_port=server.cfg.reuse_port)
        if error is not None:
            if server.pidfile is not None:
                server.pidfile.unlink()
            sys.exit(f"error: {address.explain(error, host, port, *given)}")


def on_starting(server: Any) -> None:
    """In the master: check worker class and address, also of the command line; make the workers' folder for metrics."""
    if server.cfg.worker_class_str != OWN_WORKER_CLASS:
        sys.exit(f"error: the worker class {server.cfg.worker_class_str} cannot serve this; leave out -k")
    _check_addresses(server)
    server.boot, fill = os.pipe()  # the one worker that finds the byte in it stops the service: see app.end_process
    os.write(fill, b".")
    os.close(fill)
    server.handover = Handover(server.master_pid, workers) if server.master_pid else None
    # Two generations stand side by side during a rolling restart; their files must differ, their folder must not.
    server.suffix = os.environ.get(_SUFFIX, "")
    server.metrics = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    server.own_metrics = None
    try:
        if not server.metrics:
            inherited = os.environ.get(_FOLDER, "")
            if os.path.isdir(inherited):
                server.metrics, server.own_metrics = inherited, folder.hold(inherited)
            else:
                server.metrics, server.own_metrics = folder.make(worker_tmp_dir)
        for file in Path(server.metrics).glob("gauge_live*.db"):  # of workers that no longer are
            if not server.master_pid or file.stem.endswith(_NEXT) == bool(server.suffix):
                file.unlink()
    except OSError as error:
        logging.getLogger("gunicorn.error").warning("no folder for shared metrics: %s", error)


def pre_exec(server: Any) -> None:
    """In the child that becomes the new master (SIGUSR2): what it has to know of this one."""
    if server.pid == 1:
        logging.getLogger("gunicorn.error").error(
            "SIGUSR2 is refused: this is process 1 of a container, which ends with it; start a new container instead"
        )
        logging.shutdown()
        os._exit(1)
    server.cfg.env_orig |= {_SUFFIX: "" if server.suffix else _NEXT, _FOLDER: server.metrics or ""}
    args = server.START_CTX["args"]
    if Path(args[1]).name == "__main__.py":  # started with python -m gunicorn
        args[1:2] = ["-m", "gunicorn"]


def child_exit(server: Any, worker: Any) -> None:
    """In the master: what a dead worker had in progress or in memory is gone; what it counted stays."""
    if server.metrics:
        for file in Path(server.metrics).glob(f"gauge_live*_{worker.slot}{server.suffix}.db"):
            file.unlink(missing_ok=True)


def on_exit(server: Any) -> None:
    """In the master: leave nothing behind, unless the next generation uses it."""
    if server.own_metrics is not None:
        os.close(server.own_metrics)
        folder.remove(server.metrics)


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: give the new worker a free slot on the GPU that has the fewest workers, the lowest of these."""
    taken = {other.slot for other in server.WORKERS.values()}
    gpus = len(_devices) or 1
    crowd = Counter(slot % gpus for slot in taken)
    free = set(range(len(taken) + gpus)) - taken  # among them is the lowest one of each such GPU
    worker.slot = min(free, key=lambda slot: (crowd[slot % gpus], slot))
    worker.handover = getattr(server, "handover", None)


def post_fork(server: Any, worker: Any) -> None:
    """In the worker: see one GPU only, the one of its slot; know where to count, and whether others serve."""
    if _devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = _devices[worker.slot % len(_devices)]
        logging.getLogger("gunicorn.error").info(
            "worker slot %d: GPU %s", worker.slot, os.environ["CUDA_VISIBLE_DEVICES"]
        )
    if getattr(server, "metrics", None):
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = server.metrics
        os.environ["RERANKER_SLOT"] = f"{worker.slot}{server.suffix}"
        worker.place = server.metrics, worker.slot, server.suffix
    # Where others serve meanwhile, a later worker loads before it listens; alone, it answers "loading" instead.
    later = worker.age > workers
    serving = bool(getattr(server, "master_pid", 0)) or (later and bool(server.WORKERS))
    os.environ["RERANKER_SIBLINGS"] = "1" if serving else "0"
    os.environ["RERANKER_RESPAWNED"] = "1" if later else "0"
    os.environ["RERANKER_LISTENERS"] = ",".join(map(str, getattr(server, "LISTENERS", ())))
    os.environ["RERANKER_BOOT"] = str(getattr(server, "boot", ""))
