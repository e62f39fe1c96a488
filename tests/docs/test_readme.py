"""The READMEs are true: their commands run, both say the same, and neither grows without end."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from config import load_settings
from reranker.environment import read_env_file
from tests.cli.command import cli, read_lines, write_lines
from tests.conftest import ROOT, Server

READMES = ["README.md", "README.zh-CN.md"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(name), re.M | re.S)


def test_a_readme_has_at_most_200_lines() -> None:
    for name in READMES:
        assert len(text(name).splitlines()) <= 200


def test_both_have_the_same_commands() -> None:
    for language in ("bash", "python"):
        first, second = ([re.sub(r"\s+#.*", "", block) for block in blocks(name, language)] for name in READMES)
        assert first == second
    shown = [re.findall(r"^    (\S.*?)(?:\s+#.*)?$", text(name), re.M) for name in READMES]
    assert shown[0] == shown[1]


@pytest.mark.parametrize("name", READMES)
def test_the_curl_commands_answer_what_is_said(server: Server, name: str) -> None:
    answers = []
    for block in blocks(name, "bash"):
        command = shlex.split(block.replace("127.0.0.1:6006", f"127.0.0.1:{server.port}"))
        assert command[0] == "curl"
        out = subprocess.run([*command, "-s", "--noproxy", "*"], capture_output=True, text=True, check=True)
        answers.append(json.loads(out.stdout))
    [[best], results] = answers
    assert best["index"] == 1
    assert set(best) == {"index", "score"}
    first = results["results"][0]
    assert set(first) == {"index", "relevance_score", "text"}
    assert first["index"] == 1
    assert first["text"].startswith("gzip 是")
    shown = [float(x) for x in re.findall(r'score": (0\.\d\d)', text(name))]
    assert [best["score"], first["relevance_score"]] == pytest.approx(shown, abs=0.01)


def test_the_python_client_prints_a_ranking(server: Server) -> None:
    code = blocks(READMES[0], "python")[0]  # the same in both
    code = code.replace("127.0.0.1:6006", f"127.0.0.1:{server.port}")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in out.stdout.splitlines()] == ["1", "0"]


def test_the_library_example_runs() -> None:
    code = blocks(READMES[0], "python")[1]
    with redirect_stdout(StringIO()) as out:
        exec(code, {})  # in this process, which has torch already
    chess, gzip = json.loads(out.getvalue())
    assert gzip > chess


def test_the_sample_of_settings_is_read_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [sample] = blocks(READMES[0], "ini")
    translated = blocks(READMES[1], "ini")
    assert [re.sub(r"\s+#.*", "", block) for block in translated] == [re.sub(r"\s+#.*", "", sample)]
    file = tmp_path / ".env"
    for written in (sample, sample.replace("# HF_ENDPOINT", "HF_ENDPOINT")):
        file.write_text(written)
        with monkeypatch.context() as patch:
            for name in read_env_file(file):
                patch.setenv(name, "")  # blank counts as not set; what load_settings exports ends with the context
            settings = load_settings(file)
        assert settings.model_name_or_path == "Qwen/Qwen3-Reranker-4B"
        assert settings.access_token
        assert settings.workers == 1


@pytest.mark.parametrize("verb", ["rank", "batch", "check"])
def test_the_commands_run(verb: str, tmp_path: Path) -> None:
    [line] = re.findall(rf"^    \.venv/bin/python -m reranker ({verb} .*?|{verb})(?:\s+#.*)?$", text(READMES[0]), re.M)
    write_lines(tmp_path / "in.jsonl", [{"id": 1, "query": "cats", "documents": ["a cat", "bread"]}])
    out = cli(*shlex.split(line), cwd=tmp_path)
    if verb == "rank":
        assert "gzip" in out.stdout.splitlines()[0]
    elif verb == "batch":
        assert [row["id"] for row in read_lines(tmp_path / "out.jsonl")] == [1]
    else:
        assert json.loads(out.stdout)["self_check"] == "passed"


def test_a_sample_that_needs_a_token_makes_one_and_fails_without() -> None:
    patterns = ("*.md", "docs/*.md", "deploy/**/*.y*ml", "docker-compose*.yml")
    for path in [path for pattern in patterns for path in ROOT.glob(pattern)]:
        named = re.findall(r"(?<!\$)\$(?:TOKEN\b|\{TOKEN\b[^}]*\})", path.read_text(encoding="utf-8"))
        assert set(named) <= {"${TOKEN:?}"}, path.name
        assert not named or "TOKEN=$(openssl rand -hex 32)" in path.read_text(encoding="utf-8"), path.name


@pytest.mark.parametrize("name", READMES)
def test_the_command_that_writes_the_file_of_settings_puts_a_token_in(name: str, tmp_path: Path) -> None:
    [command] = re.findall(r"^    (TOKEN=.*?)\s+#", text(name), re.M)
    shutil.copy(ROOT / ".env.example", tmp_path)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{64}", read_env_file(tmp_path / ".env")["ACCESS_TOKEN"].text)
    (tmp_path / ".env").unlink()
    (tmp_path / "openssl").write_text("#!/bin/sh\n")  # prints nothing
    (tmp_path / "openssl").chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    assert subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True).returncode != 0
    assert not (tmp_path / ".env").exists()
