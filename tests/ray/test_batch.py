"""`python -m deploy.ray_batch` as a process on a real cluster: equal to the command line; killed, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from ray.cluster_utils import Cluster

from reranker import Scorer
from tests.batch.test_local import BAD, GOOD, inputs
from tests.cli.command import cli, environment, read_lines, write_lines
from tests.conftest import ROOT

COMMAND = [sys.executable, "-m", "deploy.ray_batch"]
UNCOLLECTED = [
    sys.executable,
    "-c",
    "import gc; gc.disable(); from deploy.ray_batch import main, run; run(main)",
]
"""The same, without garbage collection of reference cycles."""
MODEL = ("--device", "cpu", "--max-batch-tokens", "1024")
SMALL = ("--part-bytes", "1000", *MODEL)
STORE = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}


@pytest.fixture(scope="session")
def store() -> Iterator[dict[str, str]]:
    """Environment variables to reach a store that is not the local disk."""
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield STORE | {"FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}"}
    server.stop()


@pytest.fixture(scope="session")
def cluster(store: dict[str, str]) -> Iterator[Cluster]:
    """A node with one CPU, the program, and a way to the store."""
    before = dict(os.environ)
    os.environ.update(store, PYTHONPATH=str(ROOT), RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1")
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    yield made
    made.shutdown()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, dict[int, float]]]:
    """Many rows in a file, and their scores."""
    path = write_lines(tmp_path_factory.mktemp("expected") / "in.jsonl", inputs(200))
    scorer = Scorer.load(device="cpu", max_batch_tokens=1024)
    return path, {row["id"]: dict(enumerate(scorer.rerank(row["query"], row["documents"]))) for row in inputs(200)}


def scores(row: dict[str, Any]) -> dict[int, float]:
    return {found["index"]: found["score"] for found in row["results"]}


def results(output: Path, kind: str = "part") -> list[dict[str, Any]]:
    return [row for path in sorted(output.glob(f"{kind}-*.jsonl")) for row in read_lines(path)]


def records(output: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_bytes()) for path in sorted(output.glob("_done/*.json"))]


def check(output: Path, rows: dict[Any, dict[int, float]]) -> None:
    """Every row once, with its scores."""
    found = results(output)
    assert [(row["file"], row["line"], row["id"]) for row in found] == [
        ("in.jsonl", i + 1, name) for i, name in enumerate(rows)
    ]
    for row in found:
        assert scores(row) == pytest.approx(rows[row["id"]], abs=1e-5)
        assert list(scores(row).values()) == sorted(scores(row).values(), reverse=True)


class Running:
    """A batch in progress."""

    def __init__(self, *args: object, cwd: Path, command: Sequence[str] = COMMAND) -> None:
        self.log = cwd / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, *map(str, args)],
                cwd=cwd,
                env=environment(PYTHONFAULTHANDLER="1"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def wait_for(self, output: Path, parts: int, processes: int = 1) -> list[dict[str, Any]]:
        """Wait until at least `parts` parts are finished, by at least `processes` actors."""
        deadline = time.monotonic() + 120
        while len(found := records(output)) < parts or len({record["process"] for record in found}) < processes:
            assert self.process.poll() is None, f"the batch ended too early:\n{self.log.read_text()[-5_000:]}"
            assert time.monotonic() < deadline, self.log.read_text()[-5_000:]
            time.sleep(0.01)
        return found

    def finish(self) -> str:
        try:
            code = self.process.wait(200)
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGABRT)  # it prints all stacks
            code = self.process.wait(10)
        assert code == 0, self.log.read_text()[-5_000:]
        return self.log.read_text()


def test_from_and_to_a_store_equal_to_the_command_line(cluster: Cluster, store: dict[str, str], tmp_path: Path) -> None:
    data, lists, pairs = tmp_path / "data", [row | {"top_k": 2} for row in inputs(60)], inputs(40)
    (data / "deep").mkdir(parents=True)
    good = json.dumps(GOOD).encode()
    lines = b"\xef\xbb\xbf" + b"\r\n".join([good, b"", *(line for line, _ in BAD), json.dumps(lists[0]).encode()])
    (data / "lines.jsonl").write_bytes(lines)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(lists), data / "deep" / "lists.parquet", row_group_size=13)
    flat = [{"id": i, "query": r["query"], "document": d} for i, r in enumerate(pairs) for d in r["documents"]]
    flat[0]["lang"] = "en"
    write_lines(data / "pairs.jsonl", [*flat, {"id": "x", "query": "q", "document": 1}])
    (data / "_ignored.jsonl").write_text("not data")
    fs = s3fs.S3FileSystem(key="a", secret="b", endpoint_url=store["FSSPEC_S3_ENDPOINT_URL"])
    fs.mkdir("bucket")
    fs.put(str(data), "bucket/data", recursive=True)

    args = ("s3://bucket/data", "s3://bucket/out", *SMALL, "--address", cluster.address)
    done = cli(*args, cwd=tmp_path, command=COMMAND, env=store)
    assert "3 files, " in done.stderr
    assert f"\n{len(BAD) + 1} bad rows were skipped; see s3://bucket/out/bad-*.jsonl\n" in done.stderr
    assert done.stderr.count("note: pairs.jsonl line 1: lang is not read\n") == 1
    assert done.stderr.count("lang is not read") == 1
    fs.invalidate_cache()
    fs.get("bucket/out", str(tmp_path / "out"), recursive=True)
    parts = len(records(tmp_path / "out"))
    assert parts > 5

    # The same rows in one file, pairs as lists of one.
    single = [{**row, "documents": [row["document"]]} for row in flat]
    rest = write_lines(tmp_path / "rest", [*lists, *single]).read_bytes()
    (tmp_path / "in.jsonl").write_bytes(lines + b"\n" + rest)
    cli("batch", "in.jsonl", "local.jsonl", *MODEL, "--skip-bad", cwd=tmp_path)
    local = [row for row in read_lines(tmp_path / "local.jsonl") if "error" not in row]
    found = sorted(results(tmp_path / "out"), key=lambda row: ["lin", "dee", "pai"].index(row["file"][:3]))
    assert [(row["file"], row.get("row", row.get("line")), row["id"]) for row in found] == [
        ("lines.jsonl", 1, None),
        ("lines.jsonl", 3 + len(BAD), "q0"),
        *(("deep/lists.parquet", i + 1, row["id"]) for i, row in enumerate(lists)),
        *(("pairs.jsonl", i + 1, row["id"]) for i, row in enumerate(flat)),
    ]
    for row, same in zip(found, local, strict=True):
        if row["file"] == "pairs.jsonl":
            assert row["score"] == pytest.approx(same["results"][0]["score"], abs=1e-5)
        else:
            assert scores(row) == pytest.approx(scores(same), abs=1e-5)
            assert len(row["results"]) == len(same["results"])

    bad = results(tmp_path / "out", "bad")
    for row, (at, (_, says)) in zip(bad, enumerate(BAD, 3), strict=False):
        assert (row["file"], row["line"]) == ("lines.jsonl", at)
        assert says in row["error"]
    last = {"file": "pairs.jsonl", "line": len(flat) + 1, "id": "x"}
    error = 'document: must be a string or an object with a string "text" (or "content", "page_content"); got a number'
    assert bad[len(BAD) :] == [last | {"error": error}]

    again = cli(*args, cwd=tmp_path, command=COMMAND, env=store)
    assert f"{parts} parts, {parts} of them finished before" in again.stderr
    assert "nothing to do: every part is finished" in again.stderr
    fs.pipe_file("bucket/data/pairs.jsonl", (data / "pairs.jsonl").read_bytes() + b"\n")
    changed = cli(*args, "--top-k", 1, cwd=tmp_path, command=COMMAND, env=store, code=2)
    assert "error: s3://bucket/out was begun with another input and another top_k; use the same" in changed.stderr


def test_a_killed_run_is_resumed(
    cluster: Cluster, expected: tuple[Path, dict[Any, dict[int, float]]], tmp_path: Path
) -> None:
    lines, rows = expected
    output = tmp_path / "out"
    args = (lines, output, *SMALL, "--address", cluster.address)
    running = Running(*args, cwd=tmp_path)
    running.wait_for(output, 3)
    running.process.send_signal(signal.SIGKILL)
    assert running.process.wait(30) == -signal.SIGKILL
    actor = records(output)[0]["process"]
    deadline = time.monotonic() + 60
    while psutil.pid_exists(actor):  # Ray ends the actors of a driver that is gone
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (output / "_summary.json").exists()
    finished = {path: (path.stat().st_ino, path.read_bytes()) for path in output.glob("_done/*.json")}
    # As after a death between two files: rows without a record, and half of an unfinished file.
    half = output / f"part-{len(finished):06d}.jsonl"
    half.write_bytes(b'{"file": "in.jsonl", "li')
    (output / "_draft-0").write_bytes(b"{")

    resumed = cli(*args, cwd=tmp_path, command=COMMAND)
    parts = len(records(output))
    assert 3 <= len(finished) < parts
    assert f"1 file, {parts} parts, {len(finished)} of them finished before" in resumed.stderr
    left = [record for record in records(output) if record["process"] != actor]
    assert len(left) == parts - len(finished)
    assert f"\n{sum(record['rows'] for record in left)} rows, " in resumed.stderr
    assert " bad row" not in resumed.stderr
    for path, (inode, content) in finished.items():
        assert (path.stat().st_ino, path.read_bytes()) == (inode, content)
    check(output, rows)
    summary = json.loads((output / "_summary.json").read_bytes())
    assert summary == {
        "parts": parts,
        "rows": len(rows),
        "bad": 0,
        "documents": sum(map(len, rows.values())),
        "truncated": 0,
    }
    assert not (output / "_draft-0").exists()


def test_a_node_and_an_actor_die_and_nothing_is_lost(
    cluster: Cluster, expected: tuple[Path, dict[Any, dict[int, float]]], tmp_path: Path
) -> None:
    lines, rows = expected
    output = tmp_path / "out"
    node = cluster.add_node(num_cpus=1, object_store_memory=100 << 20)
    try:
        args = (lines, output, *SMALL, "--actors", 2, "--cpus", 1, "--address", cluster.address)
        running = Running(*args, cwd=tmp_path, command=UNCOLLECTED)
        first = {record["process"] for record in running.wait_for(output, 4, processes=2)}
    finally:
        cluster.remove_node(node, allow_graceful=False)
    survivors = {process for process in first if psutil.pid_exists(process)}
    for process in survivors:
        os.kill(process, signal.SIGKILL)
    running.finish()
    found = records(output)
    assert len({record["process"] for record in found} - first) >= 1  # Ray started another
    assert [record["part"] for record in found] == list(range(len(found)))
    check(output, rows)


def test_an_actor_that_dies_while_it_loads_is_replaced(
    cluster: Cluster, expected: tuple[Path, dict[Any, dict[int, float]]], tmp_path: Path
) -> None:
    lines, rows = expected
    output = tmp_path / "out"
    others = actors()  # of the test before, not ended yet
    running = Running(lines, output, *SMALL, "--address", cluster.address, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (loading := actors() - others):
        assert time.monotonic() < deadline, running.log.read_text()
        time.sleep(0.01)
    assert not records(output)
    for process in loading:
        process.kill()
    log = running.finish()
    assert log.count(": starting new actors") == 1
    check(output, rows)


def actors() -> set[psutil.Process]:
    """Processes of Ray that score, or will."""
    found = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if "MapWorker" in " ".join(process.cmdline()):
                found.add(process)
    return found
