"""gunicorn's settings, all derived from config.py: `gunicorn -c gunicorn.conf.py app:app`."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from config import OWN_WORKER_CLASS, SettingsError, load_settings, log_config

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

if workers > 1:  # else every worker starts as many threads as there are cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))


def on_starting(server: Any) -> None:
    """In the master: a folder for the workers' metrics, empty and in memory where possible; or the operator's own."""
    server.metrics, server.own_metrics = os.environ.get("PROMETHEUS_MULTIPROC_DIR"), None
    try:
        if not server.metrics:
            server.metrics = server.own_metrics = tempfile.mkdtemp(prefix="reranker-metrics-", dir=worker_tmp_dir)
        for file in Path(server.metrics).glob("gauge_live*.db"):  # of workers that no longer are
            file.unlink()
    except OSError as error:
        logging.getLogger("gunicorn.error").warning("no folder for shared metrics: %s", error)


def child_exit(server: Any, worker: Any) -> None:
    """In the master: what a dead worker had in progress or in memory is gone; what it counted stays."""
    if server.metrics:
        for file in Path(server.metrics).glob(f"gauge_live*_{worker.slot}.db"):
            file.unlink(missing_ok=True)


def on_exit(server: Any) -> None:
    """In the master: leave nothing behind."""
    if server.own_metrics:
        shutil.rmtree(server.own_metrics, ignore_errors=True)


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: give the new worker the lowest slot that no living worker has."""
    taken = {getattr(other, "slot", None) for other in server.WORKERS.values()}
    worker.slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)


def post_fork(server: Any, worker: Any) -> None:
    """In the worker: see one GPU only, the one of its slot; know where to count, and whether this is the first boot."""
    if _gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = [d.strip() for d in visible.split(",") if d.strip()] or [str(i) for i in range(_gpus)]
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[worker.slot % len(devices)]
        logging.getLogger("gunicorn.error").info(
            "worker slot %d: GPU %s", worker.slot, os.environ["CUDA_VISIBLE_DEVICES"]
        )
    if getattr(server, "metrics", None):
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = server.metrics
        os.environ["RERANKER_SLOT"] = str(worker.slot)
    # Where siblings serve meanwhile, a later worker loads before it listens; a single one answers "loading" instead.
    os.environ["RERANKER_SIBLINGS"] = "1" if worker.age > server.num_workers > 1 else "0"
    os.environ["RERANKER_RESPAWNED"] = "1" if worker.age > server.num_workers else "0"
