"""The container's promises, kept by a real process: no root, no capabilities, nothing writable but /tmp and the volume.

Without a Docker engine the test builds the box of docker-compose.yml (read_only, tmpfs, cap_drop, no-new-privileges,
a volume) from kernel namespaces and mounts, and runs the Dockerfile's own files and command in it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, Server, Start
from tests.deploy.test_compose import every

# $1: a folder for the new root, $2: the checkout, $3: the environment with the packages and $4 the Python behind it,
# $5: the files that the Dockerfile copies; then the command. The image's /app and /cache are in /mnt, which always
# exists.
BOX = r"""
set -eu
new=$1 checkout=$2 packages=$3 python=$4 files=$5; shift 5
mount --make-rprivate /
mount --rbind / "$new"
for place in tmp mnt root home; do mount -t tmpfs -o mode=0755 box "$new/$place"; done
for kept in "$packages" "$python"; do
    case "$kept" in /tmp/*|/mnt/*|/root/*|/home/*) mkdir -p "$new$kept"; mount --bind "$kept" "$new$kept";; esac
done
mkdir "$new/mnt/app" "$new/mnt/cache"
for file in $files; do
    mkdir -p "$new/mnt/app/$(dirname "$file")"
    cp -R "$checkout/$file" "$new/mnt/app/$(dirname "$file")"
done
chmod -R a+rX "$new/mnt/app"
mount -t tmpfs -o mode=0700,uid=10001,gid=10001 box "$new/mnt/cache"
awk -v new="$new" 'index($5, new) == 1 {print $5}' /proc/self/mountinfo | while read -r point; do
    case "${point#"$new"}" in /tmp|/mnt/cache|/proc*|/sys*|/dev*) continue;; esac
    mount -o remount,bind,ro "$point" 2>/dev/null || true  # some are covered by another; the test looks at what counts
done
chmod 1777 "$new/tmp"
exec chroot "$new" setpriv --reuid 10001 --regid 10001 --clear-groups --no-new-privs \
    --inh-caps=-all --bounding-set=-all sh -c 'cd /mnt/app; exec "$@"' sh "$@"
"""
TOOLS = ("unshare", "mount", "chroot", "setpriv", "awk")


def boxed(folder: Path, *command: str) -> list[str]:
    """The command that runs `command` in a box whose root is mounted on `folder`."""
    files = [name.rstrip("/") for copy in every("COPY") for name in copy.split()[:-1] if name != "requirements.txt"]
    words = [str(folder), str(ROOT), sys.prefix, sys.base_prefix, " ".join(files)]
    script = folder.with_name("box.sh")
    script.write_text(BOX)
    return ["unshare", "--mount", "sh", str(script), *words, *command]


@pytest.fixture(scope="module")
def new_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if os.geteuid() != 0 or not all(map(shutil.which, TOOLS)):
        pytest.skip(f"needs root and {', '.join(TOOLS)}")
    folder = tmp_path_factory.mktemp("box") / "root"
    folder.mkdir()
    probe = ["unshare", "--mount", "sh", "-c", "mount --make-rprivate / && mount -t tmpfs probe /mnt"]
    tried = subprocess.run(probe, capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"may not mount: {tried.stderr[-200:]}")
    return folder


@pytest.fixture(scope="module")
def box(start: Start, new_root: Path) -> Server:
    [command] = every("CMD")
    assert command == '["gunicorn", "-c", "gunicorn.conf.py", "app:app"]'
    gunicorn = str(Path(sys.executable).with_name("gunicorn"))
    return start(
        command=boxed(new_root, gunicorn, "-c", "gunicorn.conf.py", "app:app"),
        PYTHONPATH="",
        HOME="/mnt/cache",
        HF_HOME="/mnt/cache/huggingface",
        TMPDIR="/tmp",
        ACCESS_TOKEN="t",
        token="t",
        PYTHONDONTWRITEBYTECODE="1",
    )


def processes(server: Server) -> list[int]:
    """The master, whose place `unshare` has taken, and its worker."""
    return [server.process.pid, *map(int, re.findall(r"Booting worker with pid: (\d+)", server.log))]


@pytest.mark.slow
def test_it_serves_without_rights_and_without_a_place_to_write(box: Server) -> None:
    body = {"query": "how to compress files", "documents": ["a game of chess", "gzip compresses files"]}
    assert box.client.post("/v1/rerank", json=body).json()[0]["index"] == 1
    assert "reranker_requests_total{" in box.client.get("/metrics").text
    for name in ("Traceback", "Read-only", "Permission denied", "no folder for shared metrics"):
        assert name not in box.log
    assert len(processes(box)) == 2
    for pid in processes(box):
        status = Path(f"/proc/{pid}/status").read_text()
        for line in ("Uid:\t10001\t10001\t10001\t10001", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000"):
            assert line in status
        assert re.search(r"^NoNewPrivs:\t1$", status, re.M)
        inside = Path(f"/proc/{pid}/root")
        assert (inside / "mnt" / "app" / "app.py").is_file()
        for place in ("mnt/app", "mnt", "etc", "usr", "var/tmp", str(sys.prefix).lstrip("/")):
            assert not os.access(inside / place, os.W_OK), "a read-only file system, for root, who asks here, as well"
        assert os.access(inside / "tmp", os.W_OK)
        assert os.access(inside / "mnt" / "cache", os.W_OK)


@pytest.mark.slow
def test_it_stops_cleanly(box: Server) -> None:
    box.client.close()
    assert box.stop() == 0
    assert "Traceback" not in box.log
