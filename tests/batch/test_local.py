"""`batch` as a process: killed, interrupted, resumed; nothing is scored twice or lost."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import termios
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from reranker import Scorer
from tests.cli.command import COMMAND, cli, environment, read_lines, stub, write_lines
from tests.cli.test_rank import terminal, url
from tests.conftest import GUNICORN, Server, Start

STEPPED = [*GUNICORN[:-1], "tests.faults.stepped_app:app"]

WORDS = "gzip compresses files chess is a game 压缩 文件 cat small animal".split()


def inputs(count: int) -> list[dict[str, Any]]:
    """Requests of different sizes; no text occurs twice."""
    return [
        {
            "id": f"q{i}",
            "query": f"{WORDS[i % 9]} {i}",
            "documents": [f"{WORDS[j % 11]} {i} {j}" for j in range(1 + i % 7)],
        }
        for i in range(count)
    ]


def started(args: list[str], cwd: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "batch", "in.jsonl", "out.jsonl", *args],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
        # As in a terminal: tests in the background of a shell ignore SIGINT, and so would this process.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_bytes(path: Path, count: int, process: subprocess.Popen[bytes]) -> None:
    while not (path.exists() and path.stat().st_size >= count):
        assert process.poll() is None, "the process ended before it could be interrupted"
        time.sleep(0.01)


@pytest.mark.slow
def test_killed_and_resumed_with_the_model(tmp_path: Path) -> None:
    values = inputs(250)
    write_lines(tmp_path / "in.jsonl", values)
    partial = tmp_path / "out.jsonl.partial"
    args = ["--device", "cpu", "--max-batch-tokens", "1024"]
    process = started(args, tmp_path)
    wait_for_bytes(partial, 4_000, process)
    process.send_signal(signal.SIGKILL)
    assert process.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "out.jsonl").exists()
    before = partial.read_bytes()
    done = before.count(b"\n")
    assert 0 < done < len(values)
    with partial.open("ab") as file:  # as after a power failure
        file.write(b'{"line": %d, "id": "q' % (done + 1) + b"\0" * 100)
    resumed = cli("batch", "in.jsonl", "out.jsonl", *args, cwd=tmp_path)
    assert f"continuing after line {done}: {done} lines are done" in resumed.stderr
    assert f"{len(values) - done} lines, " in resumed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)
    rows = read_lines(tmp_path / "out.jsonl")
    assert [(row["line"], row["id"]) for row in rows] == [(i + 1, value["id"]) for i, value in enumerate(values)]
    scorer = Scorer.load(device="cpu")
    for i in {0, 6, done - 1, done, len(values) - 1}:
        expected = scorer.rerank(values[i]["query"], values[i]["documents"])
        assert {r["index"]: r["score"] for r in rows[i]["results"]} == pytest.approx(
            dict(enumerate(expected)), abs=1e-6
        )
        scores = [r["score"] for r in rows[i]["results"]]
        assert scores == sorted(scores, reverse=True)


def test_interrupted_by_ctrl_c_and_resumed(start: Start, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "gate")
    passes = os.open(tmp_path / "gate", os.O_RDWR)  # a forward pass waits for each byte
    stepped = start(
        command=STEPPED,
        JOURNAL=str(tmp_path / "journal"),
        GATE=str(tmp_path / "gate"),
        FAKE_BATCH_TOKENS="30",
    )
    values = inputs(100)
    write_lines(tmp_path / "in.jsonl", values)
    process = started(["--url", url(stepped)], tmp_path)
    os.write(passes, b"." * 20)
    wait_for_bytes(tmp_path / "out.jsonl.partial", 500, process)
    while fcntl.ioctl(passes, termios.FIONREAD, bytes(4)) != bytes(4):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)  # no request in flight will be answered
    assert process.wait(30) == -signal.SIGINT
    before = (tmp_path / "out.jsonl.partial").read_bytes()
    assert 0 < before.count(b"\n") < 100
    assert before.endswith(b"\n")
    os.write(passes, b"." * 1_000)
    cli("batch", "in.jsonl", "out.jsonl", "--url", url(stepped), cwd=tmp_path)
    os.close(passes)
    assert (tmp_path / "out.jsonl").read_bytes().startswith(before)
    assert [row["id"] for row in read_lines(tmp_path / "out.jsonl")] == [value["id"] for value in values]


def test_the_same_as_a_service_answers(server: Server, tmp_path: Path) -> None:
    values = inputs(30)
    write_lines(tmp_path / "in.jsonl", values)
    cli("batch", "in.jsonl", "served.jsonl", "--url", url(server), cwd=tmp_path)
    cli("batch", "in.jsonl", "local.jsonl", "--device", "cpu", cwd=tmp_path)
    for served, local in zip(read_lines(tmp_path / "served.jsonl"), read_lines(tmp_path / "local.jsonl"), strict=True):
        assert (served["line"], served["id"]) == (local["line"], local["id"])
        scores = [{r["index"]: r["score"] for r in row["results"]} for row in (served, local)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-6)


GOOD = {"query": "q", "documents": ["a", {"text": "b"}], "instruct": "i"}
BAD: list[tuple[bytes, str]] = [
    (b"not json", "is not JSON"),
    (b"\xff", "is not UTF-8"),
    (b"[]", "must be an object with query and documents; got a list"),
    (b'{"documents": ["a"]}', "query: is required"),
    (b'{"query": " ", "documents": ["a"]}', "query: must not be empty"),
    (b'{"query": "q", "documents": []}', "documents: must hold at least one text"),
    (b'{"query": "q", "docs": ["a"]}', '"docs" is not read, did you mean documents?'),
    (b'{"query": "q", "documents": "a"}', 'documents: must be a list of texts, such as ["a", "b"]; got a string'),
    (b'{"query": "q", "documents": ["a", 1], "id": 7}', "documents[1]: must be"),
    (b'{"query": "q", "documents": ["a"], "top_k": true}', "top_k: must be"),
    (b'{"query": "q", "documents": ["a"], "instruction": 1}', "instruction: must be"),
    (b'{"query": "q", "documents": ["a"], "x": NaN}', "NaN is not JSON"),
    (b"[" * 100_000, "nested too deep"),
    (b'{"query": "q", "documents": ["a"], "query": "r"}', "query: is in one JSON object twice"),
]


def test_bad_lines_stop_the_batch_or_are_skipped(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good, b"", good, *(line for line, _ in BAD), good]))
    with stub() as service:
        stopped = cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, cwd=tmp_path, code=2)
        assert "error: line 4: this is not JSON" in stopped.stderr
        assert "--skip-bad" in stopped.stderr
        assert [r["line"] for r in read_lines(tmp_path / "out.jsonl.partial")] == [1, 3]
        skipped = cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, "--skip-bad", cwd=tmp_path)
    assert len(service.bodies) == 3  # each good line once
    assert service.bodies[0] == {"query": "q", "documents": ["a", "b"], "instruction": "i"}
    rows = read_lines(tmp_path / "out.jsonl")
    assert [row["line"] for row in rows] == [1, 3, *range(4, 4 + len(BAD)), 4 + len(BAD)]
    for row, (_, says) in zip(rows[2:-1], BAD, strict=True):
        assert says in row["error"]
        assert f"line {row['line']} skipped: {row['error']}" in skipped.stderr
    assert rows[10]["id"] == 7
    assert f"{len(BAD)} bad lines were skipped" in skipped.stderr


def test_a_line_that_the_service_refuses_is_a_bad_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"id": "only", "query": "q", "documents": ["d"]}])
    with stub(*[(422, {}, b'{"detail": "the query is too long"}')] * 2) as service:
        err = cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, cwd=tmp_path, code=2).stderr
        assert "line 1: the query is too long" in err
        cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, "--skip-bad", cwd=tmp_path)
    assert read_lines(tmp_path / "out.jsonl") == [{"line": 1, "id": "only", "error": "the query is too long"}]


def test_a_query_that_leaves_no_room_is_a_bad_line(tmp_path: Path) -> None:
    lines = [
        {"query": "a", "documents": ["b"]},
        {"query": "a " * 500, "documents": ["b"]},
        {"query": "a", "documents": ["c"]},
    ]
    write_lines(tmp_path / "in.jsonl", lines)
    args = ("in.jsonl", "out.jsonl", "--max-seq-length", 256, "--device", "cpu", "--skip-bad")
    assert "line 2 skipped: the query and instruction leave no room" in cli("batch", *args, cwd=tmp_path).stderr
    rows = read_lines(tmp_path / "out.jsonl")
    assert [sorted(row) for row in rows] == [
        ["id", "line", "results"],
        ["error", "id", "line"],
        ["id", "line", "results"],
    ]


def test_an_output_that_is_there_is_kept_unless_told(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [GOOD | {"id": "é", "top_k": 1}, GOOD])
    (tmp_path / "out.jsonl").write_text("precious")
    with stub() as service:
        args = ("batch", "in.jsonl", "out.jsonl", "--url", service.url)
        assert "out.jsonl exists already" in cli(*args, cwd=tmp_path, code=2).stderr
        assert (tmp_path / "out.jsonl").read_text() == "precious"
        assert service.bodies == []
        cli(*args, "--overwrite", cwd=tmp_path)
    first, second = read_lines(tmp_path / "out.jsonl")
    assert first == {"line": 1, "id": "é", "results": [{"index": 0, "score": 0.5}]}
    assert len(second["results"]) == 2
    assert "another file than the input" in cli("batch", "in.jsonl", "./in.jsonl", cwd=tmp_path, code=2).stderr


def test_an_unfinished_output_is_continued_with_the_same_only(tmp_path: Path) -> None:
    bad = tmp_path / "in.jsonl"
    bad.write_bytes(json.dumps(GOOD).encode() + b"\nbad\n")
    with stub() as service:
        args = ("batch", "in.jsonl", "out.jsonl", "--url", service.url)
        cli(*args, cwd=tmp_path, code=2)
        err = cli(*args, "--top-k", 1, "--skip-bad", cwd=tmp_path, code=2).stderr
        assert "out.jsonl.partial was begun with another top_k" in err
        bad.write_bytes(json.dumps(GOOD).encode() + b"\n\n")
        assert "begun with another input" in cli(*args, cwd=tmp_path, code=2).stderr
        assert len(read_lines(tmp_path / "out.jsonl.partial")) == 1
        cli(*args, "--overwrite", cwd=tmp_path)
    assert len(service.bodies) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_top_k_with_pairs_is_noted_once(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", [{"query": "q", "document": f"d{i}"} for i in range(3)])
    with stub() as service:
        args = ("batch", "in.jsonl", "out.jsonl", "--url", service.url)
        assert "--top-k" not in cli(*args, cwd=tmp_path).stderr
        err = cli(*args, "--top-k", 1, "--overwrite", cwd=tmp_path).stderr
    assert err.count("--top-k") == 1
    assert "line 1: --top-k has no effect on a row with document: its result is one score\n" in err
    assert [row["score"] for row in read_lines(tmp_path / "out.jsonl")] == [0.5] * 3


def test_progress_in_a_terminal(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", inputs(40))
    with stub() as service:
        shown = terminal(["batch", "in.jsonl", "out.jsonl", "--url", service.url], tmp_path, 80, stderr=True)
    assert "100%" in shown
    assert "documents/s" in shown
    assert "40 lines, " in shown


def test_a_full_disk_is_one_error_and_no_loss(tmp_path: Path) -> None:
    write_lines(tmp_path / "in.jsonl", inputs(40))
    with stub() as service:
        command = f"{' '.join(COMMAND)} batch in.jsonl out.jsonl --url {service.url}"
        limited = ["bash", "-c", f"ulimit -f 1; exec {command}"]  # a file may have 1,024 bytes
        done = subprocess.run(limited, cwd=tmp_path, env=environment(), capture_output=True, timeout=60)
        assert done.returncode == 1
        assert b"error: cannot write out.jsonl.partial: File too large\n" in done.stderr
        assert (tmp_path / "out.jsonl.partial").stat().st_size == 1024
        cli("batch", "in.jsonl", "out.jsonl", "--url", service.url, cwd=tmp_path)
    assert [row["line"] for row in read_lines(tmp_path / "out.jsonl")] == list(range(1, 41))
