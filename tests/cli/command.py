"""The command line in a folder of its own with a clean environment: in this process, or in one of its own."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

from reranker.cli.main import main, run
from reranker.terminal import note
from tests.conftest import ROOT

COMMAND = [sys.executable, "-m", "reranker"]


def environment(**changes: str) -> dict[str, str]:
    """Return an environment without the developer's settings."""
    kept = {n: v for n, v in os.environ.items() if n in ("PATH", "HOME", "LD_LIBRARY_PATH", "TMPDIR")}
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"} | changes


def cli(
    *args: object,
    cwd: Path,
    stdin: bytes = b"",
    code: int = 0,
    env: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end and check its exit code; expected problems never show a traceback.

    `python -m reranker` runs in this process, because a process of its own imports for longer than most commands run.
    """
    words = list(map(str, args))
    if command is COMMAND:
        done = in_process(words, cwd, stdin, environment(**(env or {})))
    else:
        done = run_process(*words, cwd=cwd, stdin=stdin, env=env, command=command)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done


def run_process(
    *args: object,
    cwd: Path,
    stdin: bytes = b"",
    env: Mapping[str, str] | None = None,
    command: Sequence[str] = COMMAND,
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    words, variables = [*command, *map(str, args)], environment(**(env or {}))
    done = subprocess.run(words, cwd=cwd, env=variables, input=stdin, capture_output=True, timeout=120)
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


class _Pipe(io.BytesIO):
    """Standard input as a pipe, which cannot be rewound."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: object) -> int:
        raise io.UnsupportedOperation("seek")


def in_process(
    words: list[str], cwd: Path, stdin: bytes, variables: dict[str, str], screen: TextIO | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command in this process; `screen` receives its standard error."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    note.cache_clear()  # a note is printed once per process
    code: object = None
    with (
        chdir(cwd),
        patch.dict(os.environ, variables, clear=True),
        patch.object(sys, "stdin", io.TextIOWrapper(_Pipe(stdin), encoding="utf-8")),
        patch.object(logging.getLogger(), "handlers", []),
        redirect_stdout(out),
        redirect_stderr(screen or err),
    ):
        try:
            run(lambda: main(words))
        except SystemExit as end:
            code = end.code
    assert isinstance(code, int)
    texts = [stream.buffer.getvalue().decode() for stream in (out, err)]
    return subprocess.CompletedProcess(words, code, *texts)


def write_lines(path: Path, values: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Stub:
    """A service that answers POST /v1/rerank from a list, then with equal scores, and records the requests."""

    def __init__(self, answers: Iterable[tuple[int, dict[str, str], bytes]]) -> None:
        self.answers = list(answers)
        self.bodies: list[dict[str, Any]] = []
        self.authorization: list[str | None] = []
        self.url = ""

    def answer(self, body: bytes, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        self.bodies.append(json.loads(body))
        self.authorization.append(authorization)
        if self.answers:
            return self.answers.pop(0)
        rows = [{"index": i, "score": 0.5} for i, _ in enumerate(self.bodies[-1]["documents"])]
        return 200, {}, json.dumps(rows).encode()


@contextmanager
def stub(*answers: tuple[int, dict[str, str], bytes]) -> Iterator[Stub]:
    """A stub that listens on 127.0.0.1."""
    service = Stub(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, {}, b"ok")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self._send(*service.answer(body, self.headers["Authorization"]))

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(body))}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    service.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
