"""gunicorn's settings, all derived from config.py: `gunicorn -c gunicorn.conf.py app:app`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Any

if sys.flags.safe_path and Path.cwd() != Path(__file__).resolve().parent:  # as `reranker serve` starts it
    # gunicorn has put the working directory first, and does not again while it is on the path: modules there must not
    # replace the service's.
    sys.path[:] = [path for path in sys.path if path != os.getcwd()] + [os.getcwd()]

from config import OWN_WORKER_CLASS, SettingsError, load_settings, log_config
from reranker.cgroup import allowed, cores
from reranker.environment import shorten
from reranker.server import address, fleet, gpus

try:
    _settings = load_settings()
except SettingsError as error:
    sys.exit(error.report)


# Slot i uses device i % len(_devices).
_devices = gpus.usable_names() if _settings.model_device in ("auto", "cuda") and _settings.workers != 1 else []

bind = f"[{_settings.host}]:{_settings.port}" if ":" in _settings.host else f"{_settings.host}:{_settings.port}"
workers = _settings.workers or max(1, len(_devices))
worker_class = OWN_WORKER_CLASS
worker_connections = _settings.worker_connections
timeout = _settings.timeout  # for the heartbeat: the event loop never computes, so only a hang stops it
graceful_timeout = int(_settings.request_timeout) + 10
keepalive = _settings.keep_alive
preload_app = False  # every worker loads its own model, after the fork
max_requests = 0  # a recycled worker would load the model again
control_socket_disable = True
worker_tmp_dir = "/dev/shm" if os.path.isdir("/dev/shm") else None
accesslog = None  # http/access.py writes a line without the token
logconfig_dict = log_config(_settings)

if workers > 1 or cores() < allowed():  # otherwise torch's own choice of threads is right
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // workers)))


def _check_addresses(server: Any) -> None:
    """Exit with one line if an address cannot be bound; gunicorn would try five times and not name the setting."""
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
    """In the master: check worker class and addresses, which the command line may override; open the shared folder."""
    if server.cfg.worker_class_str != OWN_WORKER_CLASS:
        sys.exit(f"error: the worker class {server.cfg.worker_class_str} cannot serve this; leave out -k")
    _check_addresses(server)
    fleet.master.start(server.master_pid, server.cfg.workers, worker_tmp_dir)


def pre_exec(server: Any) -> None:
    """In the child that becomes the next master (SIGUSR2): set its environment."""
    if server.pid == 1:
        logging.getLogger("gunicorn.error").error(
            "SIGUSR2 is refused: this is process 1 of a container, which ends with it; start a new container instead"
        )
        logging.shutdown()
        os._exit(1)
    server.cfg.env_orig = fleet.master.next_environment()
    args = server.START_CTX["args"]
    if Path(args[1]).name == "__main__.py":  # started with python -m gunicorn
        args[1:2] = ["-m", "gunicorn"]


def pre_fork(server: Any, worker: Any) -> None:
    """In the master: assign a slot to the new worker."""
    fleet.master.before_fork(server.num_workers, len(server.WORKERS))
    fleet.master.assign_slot(worker.age, {other.age for other in server.WORKERS.values()}, len(_devices) or 1)


def post_fork(server: Any, worker: Any) -> None:
    """In the worker: set its context, and make only the GPU of its slot visible."""
    respawned = worker.age > workers
    on_gpu = bool(_devices) or _settings.model_device.startswith("cuda")
    slot = fleet.master.enter_worker(
        worker.age,
        workers=server.num_workers,
        gpus=max(1, len(_devices)) if on_gpu else None,
        siblings_serve=bool(server.master_pid or (respawned and server.WORKERS)),
        respawned=respawned,
        listeners=tuple(map(str, server.LISTENERS)),
    )
    if _devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = device = _devices[slot % len(_devices)]
        logging.getLogger("gunicorn.error").info("worker slot %d: GPU %s", slot, device)


def child_exit(server: Any, worker: Any) -> None:
    """In the master: clean up after an ended worker."""
    fleet.master.worker_ended(worker.age)
    fleet.master.set_wanted(server.num_workers)


def on_exit(server: Any) -> None:
    """In the master: remove the shared folder."""
    fleet.master.close()
