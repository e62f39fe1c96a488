"""`rank`: forms of input, JSON and table, and the same scores with and without a server."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from reranker import Scorer
from tests.cli.command import COMMAND, cli, environment, in_process, run_process, stub, write_lines
from tests.conftest import Server

QUERY = "how to compress files"
DOCUMENTS = ["a game of chess", "gzip compresses files", "", "用 gzip 压缩文件", '[bold]"quoted",\tTab']


FAKE = [COMMAND[0], "-m", "uvicorn", "tests.fake_app:app", "--host", "127.0.0.1", "--port", "{port}"]


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.port}"


def terminal(args: list[str], cwd: Path, columns: int, stderr: bool = False) -> str:
    """Return the output of a command in a terminal of a given width."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = environment(TERM="xterm-256color", COLUMNS=str(columns))
    if stderr:
        with ThreadPoolExecutor(1) as reader, open(follower, "w", encoding="utf-8") as screen:
            seen = reader.submit(_read, leader)
            assert in_process(args, cwd, b"", env, screen).returncode == 0
            screen.close()
            return seen.result()
    process = subprocess.Popen([*COMMAND, *args], cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=follower)
    os.close(follower)
    shown = _read(leader)
    assert process.wait(60) == 0
    return shown


def _read(leader: int) -> str:
    seen = b""
    while True:
        try:
            seen += os.read(leader, 65536)
        except OSError:  # Linux: the other end is closed
            break
    os.close(leader)
    return seen.decode()


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return Scorer.load(device="cpu").rerank(QUERY, DOCUMENTS)


def check(rows: list[dict[str, Any]], expected: list[float]) -> None:
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    assert {row["index"]: row["text"] for row in rows} == dict(enumerate(DOCUMENTS))
    for row in rows:
        assert row["score"] == pytest.approx(expected[row["index"]], abs=1e-6)


def test_the_same_scores_in_process_and_from_a_service(expected: list[float], server: Server, tmp_path: Path) -> None:
    local = cli("rank", QUERY, *DOCUMENTS, "--device", "cpu", cwd=tmp_path)
    served = cli("rank", QUERY, *DOCUMENTS, "--url", url(server), cwd=tmp_path)
    check(json.loads(local.stdout), expected)
    check(json.loads(served.stdout), expected)
    assert local.stderr.startswith("loading demo (cpu)...\nnote: the bundled demo model")
    assert served.stderr == ""


def test_an_instruction_reaches_the_model(expected: list[float], server: Server, tmp_path: Path) -> None:
    args = (QUERY, *DOCUMENTS, "--instruction", "Find a game to play", "--url", url(server))
    rows = json.loads(cli("rank", *args, cwd=tmp_path).stdout)
    assert any(abs(row["score"] - expected[row["index"]]) > 1e-4 for row in rows)


def test_a_line_for_each_document(server: Server, tmp_path: Path) -> None:
    args = ("rank", QUERY, *DOCUMENTS, "--url", url(server))
    rows = json.loads(cli(*args, cwd=tmp_path).stdout)
    lines = cli(*args, "--output", "jsonl", cwd=tmp_path).stdout
    assert [json.loads(line) for line in lines.splitlines()] == rows
    table = csv.DictReader(cli(*args, "--output", "csv", cwd=tmp_path).stdout.splitlines(keepends=True))
    assert [{"index": int(r["index"]), "score": float(r["score"]), "text": r["text"]} for r in table] == rows
    assert table.fieldnames == ["index", "score", "text"]


@pytest.mark.parametrize("output", ["csv", "jsonl"])
def test_what_standard_output_cannot_hold_is_refused(output: str, server: Server, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('"\\ud800"\n')
    args = ("rank", QUERY, "--file", "d.jsonl", "--url", url(server), "--output", output)
    done = cli(*args, cwd=tmp_path, code=1)
    assert done.stderr == "error: standard output cannot hold a document's characters: use --output json\n"


@pytest.mark.parametrize("form", ["lines", "jsonl", "objects", "csv", "stdin", "stdin-jsonl"])
def test_every_form_of_input(form: str, server: Server, tmp_path: Path) -> None:
    documents = [d for d in DOCUMENTS if d] if form in ("lines", "stdin") else DOCUMENTS
    args = ["--url", url(server)]
    stdin = b""
    if form in ("lines", "stdin"):
        text = "\ufeff" + "\r\n\r\n".join(documents)  # as Windows saves it
        (tmp_path / "d.txt").write_bytes(text.encode())
        stdin = text.encode() if form == "stdin" else b""
        args += [] if form == "stdin" else ["--file", "d.txt"]
    elif form == "csv":
        with open(tmp_path / "d.csv", "w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file).writerows([["id", "body"], *enumerate(documents)])
        args += ["--file", "d.csv", "--field", "body"]
    else:
        write_lines(tmp_path / "d.jsonl", [{"text": d} for d in documents] if form == "objects" else documents)
        stdin = (tmp_path / "d.jsonl").read_bytes() if form == "stdin-jsonl" else b""
        args += ["--file", "-", "--input-format", "jsonl"] if stdin else ["--file", "d.jsonl"]
    rows = json.loads(cli("rank", QUERY, *args, cwd=tmp_path, stdin=stdin).stdout)
    assert {row["index"]: row["text"] for row in rows} == dict(enumerate(documents))


def test_options_may_stand_before_the_documents(server: Server, tmp_path: Path) -> None:
    rows = json.loads(cli("rank", QUERY, "--url", url(server), "--top-k", 2, *DOCUMENTS, cwd=tmp_path).stdout)
    assert [len(rows), rows[0]["text"]] == [2, DOCUMENTS[1]]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("d.txt", b"", "d.txt holds no documents"),
        ("d.txt", b"fine\n\xff\xfe\n", "d.txt line 2 is not UTF-8 at byte 0"),
        ("d.jsonl", b'"a"\n{"text": 1}\n', 'd.jsonl line 2 is neither a string nor an object with a string "text"'),
        ("d.jsonl", b'"a"\n\n{"text"}\n', "d.jsonl line 3 is not JSON"),
        (
            "d.csv",
            b"id,title\n1,x\n",
            "d.csv does not tell which column holds the text; its columns are id, title: name one with --field",
        ),
        ("d.csv", b"id,text\n1,x\n2\n", "d.csv row 2 (line 3) has too few columns: 1, not 2"),
    ],
)
def test_a_bad_file_is_named_with_its_line(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert says in cli("rank", "q", "--file", name, cwd=tmp_path, code=2).stderr


def test_a_terminal_gets_a_coloured_table_with_right_widths(server: Server, tmp_path: Path) -> None:
    documents = ["gzip compresses files", "用 gzip 压缩文件" * 9, "evil \x1b[31m\x1b]0;t\x07 line\nbreak [b]"]
    shown = terminal(["rank", QUERY, *documents, "--url", url(server)], tmp_path, columns=50)
    assert "\x1b[32m0.9" in shown  # green for a high score
    assert "\x1b]0;" not in shown
    assert "\x1b[31m\N{REPLACEMENT CHARACTER}" not in shown
    lines = [line for line in re.sub(r"\x1b\[[\d;]*m", "", shown).splitlines() if line.strip()]
    assert len(lines) == 1 + len(documents)
    assert all(cell_len(line.rstrip()) <= 50 for line in lines)
    starts = {cell_len(line[: re.search(r"document|gzip|用|evil", line).start()]) for line in lines}  # type: ignore[union-attr]
    assert starts == {15}
    assert any("…" in line and "压缩文件" in line for line in lines)
    assert any("line break [b]" in line for line in lines)


def test_a_terminal_shows_a_sign_of_life_before_the_imports_and_a_pipe_nothing(tmp_path: Path) -> None:
    leader, follower = pty.openpty()
    words = [COMMAND[0], "-X", "importtime", *COMMAND[1:], "rank", "q", "d", "--top-k", "0"]
    process = subprocess.Popen(words, cwd=tmp_path, env=environment(), stdin=subprocess.DEVNULL, stderr=follower)
    os.close(follower)
    shown = _read(leader)
    assert process.wait(60) == 2
    assert shown.index("loading...") < shown.index("rich.console")
    assert run_process("rank", "q", "d", "--top-k", "0", cwd=tmp_path).stderr.startswith("error: ")


def test_a_terminal_shows_at_once_what_is_loaded(tmp_path: Path) -> None:
    shown = terminal(["rank", QUERY, *DOCUMENTS, "--device", "cpu"], tmp_path, columns=80, stderr=True)
    assert "loading demo (cpu)..." in shown.splitlines()[0]
    assert "\x1b[2K" in shown  # the spinner is erased
    assert "note: the bundled demo model is for trying only" in shown


def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", ["x" * 2000] * 400)
    with stub() as service:
        command = f"{' '.join(COMMAND)} rank q --file d.jsonl --url {service.url} | head -c 10"
        shell = ["bash", "-o", "pipefail", "-c", command]
        done = subprocess.run(shell, cwd=tmp_path, env=environment(), capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b'[{"index":'


def test_the_first_access_token_is_sent_and_a_wrong_one_named(tmp_path: Path) -> None:
    with stub() as service:
        cli("rank", "q", "d", "--url", service.url, cwd=tmp_path, env={"ACCESS_TOKEN": " one , two"})
        cli("rank", "q", "d", "--url", service.url, "--token", "three", cwd=tmp_path, env={"ACCESS_TOKEN": "one"})
    assert service.authorization == ["Bearer one", "Bearer three"]
    with stub((401, {}, b'{"detail": "the token is wrong"}')) as service:
        err = cli("rank", "q", "d", "--url", service.url, cwd=tmp_path, code=1).stderr
    assert "refuses the token: the token is wrong; set --token or ACCESS_TOKEN" in err


def test_the_address_of_an_endpoint_is_named_as_no_base_address(server: Server, tmp_path: Path) -> None:
    err = cli("rank", "q", "d", "--url", f"{url(server)}/v1/rerank", cwd=tmp_path, code=1).stderr
    assert "/v1/rerank answers 404: " in err
    assert err.endswith("; --url is the base address, without /v1/rerank\n")


def test_nothing_at_the_address(tmp_path: Path) -> None:
    err = cli("rank", "q", "d", "--url", "http://127.0.0.1:9", cwd=tmp_path, code=1).stderr
    assert err == "error: cannot reach http://127.0.0.1:9: Connection refused; is the service running?\n"


def test_a_busy_service_is_asked_again_when_it_says(tmp_path: Path) -> None:
    busy = (429, {"Retry-After": "1"}, b'{"detail": "too busy"}')
    with stub(busy, (503, {}, b"loading")) as service:
        start = time.monotonic()
        out = cli("rank", "q", "d", "--url", service.url, cwd=tmp_path)
        assert time.monotonic() - start >= 1.5  # 1 s by the header, 0.5 s by the client's own rule
    assert len(service.bodies) == 3
    assert json.loads(out.stdout) == [{"index": 0, "score": 0.5, "text": "d"}]
    assert "is busy (429); waiting" in out.stderr
