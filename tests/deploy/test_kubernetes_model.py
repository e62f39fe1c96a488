"""The init step of deploy/kubernetes/model.yaml: the real script, a fake hub client, one download."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import MAX_WAIT
from tests.deploy.test_kubernetes import environment, one, pod

# Writes a line per call, then the model in two steps; while `hold` is there, it waits between them.
FAKE_HF = """#!/bin/sh
echo "$@" >> "$CALLS"
for folder; do :; done
[ -e "$folder/config.json" ] && echo resumed >> "$CALLS"
echo '{}' > "$folder/config.json"
while [ -e "$HOLD" ]; do sleep 0.02; done
[ -e "$FAIL" ] && { echo "connection lost" >&2; exit 1; }
echo weights > "$folder/model.safetensors"
"""


class Node:
    """A volume, and pods that start on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls, self.hold, self.fail = folder / "calls", folder / "hold", folder / "fail"
        data = one("ConfigMap", "reranker-model")["data"]
        (folder / "download.sh").write_text(data["download.sh"])
        (folder / "bin").mkdir()
        (folder / "bin" / "hf").write_text(FAKE_HF)
        (folder / "bin" / "hf").chmod(0o755)
        [init] = pod()["initContainers"]
        [program, self.script] = init["command"]
        assert (program, self.script) == ("sh", "/download/download.sh")
        self.env = environment(init)
        assert set(self.env) == {"MODELS", "HUB_MODEL", "HUB_REVISION", "HF_ENDPOINT"}
        # Where the service will look, on this volume.
        served = environment(pod()["containers"][0])["MODEL_NAME_OR_PATH"]
        self.model = folder / served.removeprefix("/")

    def start(self, **changes: str) -> subprocess.Popen[str]:
        paths = {"MODELS": f"{self.folder}{self.env['MODELS']}", "CALLS": str(self.calls)}
        paths |= {"HOLD": str(self.hold), "FAIL": str(self.fail)}
        return subprocess.Popen(
            ["sh", str(self.folder / "download.sh")],
            env=self.env | paths | {"PATH": f"{self.folder}/bin:{os.environ['PATH']}"} | changes,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, **changes: str) -> int:
        process = self.start(**changes)
        process.communicate(timeout=MAX_WAIT)
        return process.returncode

    def downloads(self) -> int:
        return len(self.called("download"))

    def called(self, word: str) -> list[str]:
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        return [line for line in lines if line.startswith(word)]

    def wait(self, downloads: int) -> None:
        deadline = time.monotonic() + MAX_WAIT
        while self.downloads() < downloads or not (self.model / "config.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_downloads_once_to_where_the_service_looks(node: Node) -> None:
    assert [node.run(), node.run(), node.run()] == [0, 0, 0]
    assert node.called("download") == [
        f"download {node.env['HUB_MODEL']} --revision {node.env['HUB_REVISION']} --local-dir {node.model}"
    ]
    assert (node.model / "model.safetensors").read_text() == "weights\n"


def test_another_revision_leaves_the_first_alone(node: Node) -> None:
    assert node.run() == 0
    assert node.run(HUB_REVISION="b" * 40) == 0
    assert node.downloads() == 2
    assert (node.model / "model.safetensors").exists()
    assert (node.model.with_name("b" * 40) / "model.safetensors").exists()


def test_a_failed_download_fails_the_pod_and_is_resumed(node: Node) -> None:
    node.fail.touch()
    assert node.run() == 1
    assert not (node.model / "model.safetensors").exists()
    node.fail.unlink()
    assert node.run() == 0
    assert (node.downloads(), len(node.called("resumed"))) == (2, 1)
    assert node.run() == 0
    assert node.downloads() == 2


def test_a_killed_download_is_resumed_by_the_next_pod(node: Node) -> None:
    node.hold.touch()
    first = node.start()
    node.wait(1)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate(timeout=MAX_WAIT)
    node.hold.unlink()
    assert node.run() == 0
    assert (node.downloads(), len(node.called("resumed"))) == (2, 1)


@pytest.mark.parametrize("fails", [False, True])
def test_of_two_pods_one_downloads_and_the_other_waits(node: Node, fails: bool) -> None:
    node.hold.touch()
    first = node.start()
    node.wait(1)
    second = node.start()
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    assert node.downloads() == 1
    if fails:
        os.killpg(first.pid, signal.SIGKILL)
        node.wait(2)  # the lock is free, and the second takes over
    node.hold.unlink()
    outputs = [process.communicate(timeout=MAX_WAIT)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (-signal.SIGKILL if fails else 0, 0)
    assert node.downloads() == (2 if fails else 1)
    assert ("is complete" in outputs[1]) != fails
    assert (node.model / "model.safetensors").exists()


def test_the_real_client_knows_the_options() -> None:
    hf = Path(sys.executable).with_name("hf")
    text = subprocess.run([hf, "download", "--help"], capture_output=True, text=True, check=True).stdout
    assert "--revision" in text
    assert "--local-dir" in text
