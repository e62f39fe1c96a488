"""A GPU for every slot, and no slot twice: the hooks of gunicorn.conf.py, with fakes and in the real gunicorn."""

from __future__ import annotations

import os
import re
import runpy
import signal
import subprocess
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from reranker.server import fleet
from tests.conftest import FAKE, GUNICORN, ROOT, Server, Start
from tests.faults.test_process import gone
from tests.faults.test_restart import PID, end, restart
from tests.faults.traffic import until
from tests.gpus import Gpu, Machine


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fleet, "context", fleet.context)
    monkeypatch.setattr(fleet, "master", fleet.Master())
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def conf(monkeypatch: pytest.MonkeyPatch, gpus: int = 0, **env: str) -> dict[str, Any]:
    """The names of gunicorn.conf.py as gunicorn would read them, on a machine with so many GPUs."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    asked = SimpleNamespace(returncode=0, stdout=" ".join(map(str, range(gpus))) + "\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: asked)
    return runpy.run_path(str(ROOT / "gunicorn.conf.py"))


class Master:
    """As much of gunicorn's arbiter as the hooks see."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names, self.WORKERS, self.num_workers, self.age = names, dict[int, Any](), names["workers"], 0
        self.master_pid, self.LISTENERS = 0, ["http://127.0.0.1:6006"]

    def spawn(self) -> tuple[int, str | None, bool]:
        """Fork a worker: its id, the GPUs it sees, and whether it is respawned."""
        self.age += 1
        worker = SimpleNamespace(age=self.age)
        self.names["pre_fork"](self, worker)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.names["post_fork"](self, worker)
        seen, respawned = os.environ.get("CUDA_VISIBLE_DEVICES"), fleet.context.respawned
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # that happened in the child
        if visible is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
        self.WORKERS[self.age] = worker
        return self.age, seen, respawned

    def die(self, worker: int) -> None:
        del self.WORKERS[worker]


def test_a_respawned_worker_takes_the_gpu_that_became_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    master = Master(conf(monkeypatch, gpus=3, WORKERS="auto"))
    assert master.num_workers == 3
    assert [master.spawn() for _ in range(3)] == [(1, "0", False), (2, "1", False), (3, "2", False)]
    master.die(2)
    assert master.spawn() == (4, "1", True)
    master.die(1)
    master.die(4)
    assert {master.spawn()[1], master.spawn()[1]} == {"0", "1"}


@pytest.mark.parametrize(
    ("cores", "workers", "threads"), [(16, "1", None), (4, "1", "4"), (16, "3", "5"), (4, "3", "1"), (1, "2", "1")]
)
def test_the_workers_share_the_cores_that_they_may_use(
    monkeypatch: pytest.MonkeyPatch, cores: int, workers: str, threads: str | None
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("reranker.cgroup.allowed", lambda: 16)
    monkeypatch.setattr("reranker.cgroup.cores", lambda: cores)
    conf(monkeypatch, WORKERS=workers)
    assert os.environ.get("OMP_NUM_THREADS") == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    conf(monkeypatch, WORKERS=workers)
    assert os.environ["OMP_NUM_THREADS"] == "7"


def test_a_worker_of_any_slot_is_replaced_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers of a reload (SIGHUP) have higher slots than there are GPUs; a free lower one may be another GPU's."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    master = Master(conf(monkeypatch, gpus=2, WORKERS="auto"))
    assert [master.spawn()[1] for _ in range(4)] == ["0", "1", "0", "1"]
    master.die(1)
    master.die(2)
    master.die(4)
    assert master.spawn()[1] == "1"
    assert [master.spawn()[1] for _ in range(2)] == ["0", "1"]


def test_the_operators_choice_of_gpus_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    master = Master(conf(monkeypatch, gpus=2, WORKERS="auto", CUDA_VISIBLE_DEVICES="5, GPU-7c"))
    assert [master.spawn()[1] for _ in range(2)] == ["5", "GPU-7c"]


def test_more_workers_than_gpus_share_them_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    master = Master(conf(monkeypatch, gpus=2, WORKERS="4", MODEL_DEVICE="cuda"))
    assert [master.spawn()[1] for _ in range(4)] == ["0", "1", "0", "1"]


@pytest.mark.parametrize("env", [{"WORKERS": "1"}, {"WORKERS": "2", "MODEL_DEVICE": "cpu"}, {"MODEL_DEVICE": "cuda:1"}])
def test_nothing_is_pinned_without_a_choice(monkeypatch: pytest.MonkeyPatch, env: dict[str, str]) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert Master(conf(monkeypatch, gpus=2, **env)).spawn()[1] is None


def test_without_a_gpu_auto_means_one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert conf(monkeypatch, gpus=0, WORKERS="auto")["workers"] == 1


def test_every_setting_reaches_gunicorn(monkeypatch: pytest.MonkeyPatch) -> None:
    names = conf(
        monkeypatch,
        HOST="127.0.0.1",
        PORT="7000",
        WORKERS="2",
        MODEL_DEVICE="cpu",
        WORKER_CLASS="uvicorn_worker.UvicornWorker",
        WORKER_CONNECTIONS="77",
        TIMEOUT="33",
        KEEP_ALIVE="9",
        REQUEST_TIMEOUT="20",
    )
    assert names["bind"] == "127.0.0.1:7000"
    assert names["workers"] == 2
    assert names["worker_class"] == "reranker.server.worker.RerankWorker"
    assert (names["worker_connections"], names["timeout"], names["keepalive"]) == (77, 33, 9)
    assert names["graceful_timeout"] == 30
    assert names["preload_app"] is False
    assert names["accesslog"] is None
    assert conf(monkeypatch, HOST="::1")["bind"] == "[::1]:7000"


def test_a_new_generation_has_as_many_workers_as_the_command_line_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = conf(monkeypatch, WORKERS="1")
    cfg = SimpleNamespace(worker_class_str=names["worker_class"], workers=3)
    names["on_starting"](SimpleNamespace(cfg=cfg, master_pid=os.getpid()))
    pipe = fleet.master.shared.ready_pipe
    assert pipe is not None
    assert os.read(pipe, 9) == b"..", "two of the three do not end the old generation"
    fleet.master.close()


def test_a_wrong_setting_is_one_line_and_no_traceback(tmp_path: Any) -> None:
    out = subprocess.run(
        [*GUNICORN, "--check-config"],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "WORKER_CLASS": "sync"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert out.returncode != 0
    lines = (out.stdout + out.stderr).strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: WORKER_CLASS='sync' cannot be used; use uvicorn.workers.UvicornWorker")


@pytest.mark.parametrize(
    ("gpus", "env", "sharing"),
    [
        (2, {"WORKERS": "auto"}, [1, 1]),
        (2, {"WORKERS": "4"}, [2, 2, 2, 2]),
        (2, {"WORKERS": "3"}, [2, 1, 2]),
        (1, {"WORKERS": "2"}, [2, 2]),
        (2, {"WORKERS": "2", "MODEL_DEVICE": "cuda:1"}, [2, 2]),
        (2, {"WORKERS": "1"}, [1]),
        (0, {"WORKERS": "2"}, [1, 1]),
        (2, {"WORKERS": "2", "MODEL_DEVICE": "cpu"}, [1, 1]),
    ],
)
def test_a_worker_knows_how_many_share_its_gpu(
    monkeypatch: pytest.MonkeyPatch, gpus: int, env: dict[str, str], sharing: list[int]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    master, seen = Master(conf(monkeypatch, gpus=gpus, **env)), []
    for _ in range(master.num_workers):
        master.spawn()
        seen.append(fleet.context.gpu_workers)
    assert seen == sharing


# The real gunicorn. A module by the name of torch stands for a machine with GPUs: the process that counts them asks
# nothing else, and the scorer of tests/fake_app.py asks nothing.
MACHINE = Machine([Gpu("GPU-00"), Gpu("GPU-1c"), Gpu("GPU-7c")])


@pytest.fixture
def gpus(tmp_path: Path) -> str:
    (tmp_path / "torch.py").write_text(MACHINE.module())
    return f"{tmp_path}:{ROOT}"


def workers_by_gpu(server: Server, count: int) -> dict[str, float]:
    """How many workers hold the model on which GPU, as /metrics tells, once so many do."""
    deadline = time.monotonic() + 60
    while True:
        pairs = re.findall(r'reranker_model_info{device="([^"]*)".*} (\S+)', server.client.get("/metrics").text)
        seen = {gpu: float(held) for gpu, held in pairs if float(held)}
        if sum(seen.values()) == count or time.monotonic() > deadline:
            return seen
        time.sleep(0.1)


def worker_of(server: Server, gpu: str) -> int:
    """The process id of the newest worker on a GPU."""
    slots = dict(re.findall(r"\[(\d+)\].*worker slot \d+: GPU (\S+)", server.log))
    return max(int(pid) for pid, held in slots.items() if held == gpu)


def test_real_workers_take_a_gpu_each_and_a_killed_ones_gpu_goes_to_its_successor(start: Start, gpus: str) -> None:
    log_format = "[%(process)d] %(message)s"
    server = start(command=FAKE, WORKERS="auto", PYTHONPATH=gpus, LOG_FORMAT=log_format)
    assert workers_by_gpu(server, 3) == {"0": 1, "1": 1, "2": 1}
    for gpu in ("1", "0", "2"):
        killed = worker_of(server, gpu)
        os.kill(killed, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while worker_of(server, gpu) == killed and time.monotonic() < deadline:
            time.sleep(0.05)
        assert worker_of(server, gpu) != killed
        assert workers_by_gpu(server, 3) == {"0": 1, "1": 1, "2": 1}
    server.client.close()
    assert server.stop() == 0


def test_real_workers_of_a_reload_are_replaced_on_their_gpus(start: Start, gpus: str) -> None:
    server = start(command=FAKE, WORKERS="auto", PYTHONPATH=gpus, LOG_FORMAT="[%(process)d] %(message)s")
    assert workers_by_gpu(server, 3) == {"0": 1, "1": 1, "2": 1}
    before = [worker_of(server, gpu) for gpu in "012"]
    server.process.send_signal(signal.SIGHUP)
    until(lambda: all(map(gone, before)), "the old workers have ended")
    assert workers_by_gpu(server, 3) == {"0": 1, "1": 1, "2": 1}
    for gpu in "120":
        killed = worker_of(server, gpu)
        os.kill(killed, signal.SIGKILL)
        until(partial(lambda gpu, killed: worker_of(server, gpu) != killed, gpu, killed), "it was replaced on its GPU")
        assert workers_by_gpu(server, 3) == {"0": 1, "1": 1, "2": 1}


@pytest.mark.slow
def test_a_restart_after_a_reload_reads_the_env_file_again(start: Start) -> None:
    """A reload makes gunicorn copy the environment, in which the first .env has been exported."""
    server = start(command=[*FAKE, *PID], env_file="MAX_DOCUMENTS=3\n")
    try:
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.log.count("ready after") == 2, "it is reloaded")
        server.log_path.with_name(".env").write_text("MAX_DOCUMENTS=4\n")
        restart(server)
        body = {"query": "q", "documents": ["d"] * 4}
        assert httpx.post(f"{server.client.base_url}/v1/rerank", json=body, trust_env=False).status_code == 200
    finally:
        end(server)


@pytest.mark.slow
def test_both_generations_of_a_rolling_restart_have_a_worker_on_every_gpu(start: Start, gpus: str) -> None:
    server = start(command=[*FAKE, *PID], WORKERS="auto", PYTHONPATH=gpus, LOG_FORMAT="[%(process)d] %(message)s")
    assert workers_by_gpu(server, 3) == {"0": 1, "1": 1, "2": 1}
    before = [worker_of(server, gpu) for gpu in "012"]
    try:
        restart(server)
        until(lambda: all(map(gone, before)), "the old workers have ended")
        killed = worker_of(server, "1")
        assert killed not in before
        os.kill(killed, signal.SIGKILL)
        until(lambda: worker_of(server, "1") != killed, "it was replaced on its GPU")
        assert workers_by_gpu(server, 3) == {"0": 1, "1": 1, "2": 1}
    finally:
        end(server)


def test_real_workers_share_out_the_gpus_that_the_operator_chose(start: Start, gpus: str) -> None:
    server = start(command=FAKE, WORKERS="auto", PYTHONPATH=gpus, CUDA_VISIBLE_DEVICES="GPU-7c,GPU-1c")
    assert workers_by_gpu(server, 2) == {"GPU-7c": 1, "GPU-1c": 1}
