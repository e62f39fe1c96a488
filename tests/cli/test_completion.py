"""The completion script, run by the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from reranker.cli.main import COMMANDS
from tests.cli.command import cli, environment

# bashcompinit calls the function in zsh's emulation of sh.
RUN = {
    "bash": 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _reranker; echo "${COMPREPLY[*]}"',
    "zsh": 'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); () { emulate -L sh; setopt kshglob; _reranker }; '
    'echo "${COMPREPLY[*]}"',
}


def complete(shell: str, folder: Path, *words: str) -> list[str]:
    """Return what the shell offers for the last word."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    script = cli("completion", shell, cwd=folder).stdout
    plain = ["--norc"] if shell == "bash" else ["-f"]
    command = [shell, *plain, "-c", f"{script}\n{RUN[shell]}", shell, "reranker", *words]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
    return [word for word in done.stdout.split() if shell == "bash" or word.startswith(words[-1])]  # zsh filters itself


@pytest.mark.parametrize("shell", ["bash", "zsh"])
@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ([""], [*COMMANDS, "--help", "--version"]),
        (["ev"], ["evaluate"]),
        (["evaluate", "--co"], ["--corpus", "--compare", "--concurrency"]),
        (["batch", "in.jsonl", "--over"], ["--overwrite"]),
        (["evaluate", "--beir", "x", "--output", "m"], ["markdown"]),
        (["rank", "q", "--precision", "bf"], ["bfloat16", "bf16"]),
        (["rank", "q", "--file", ""], []),  # names of files, by the shell
        (["completion", ""], ["bash", "zsh"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_shell_offers(shell: str, words: list[str], offers: list[str], tmp_path: Path) -> None:
    assert complete(shell, tmp_path, *words) == offers


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_the_help_is_offered(name: str, tmp_path: Path) -> None:
    offered = set(complete("bash", tmp_path, name, "-"))
    text = cli(name, "--help", cwd=tmp_path).stdout
    listed = {word.strip(",[]") for line in text.splitlines() for word in line.split()[:2] if line.startswith("  -")}
    assert {word for word in listed if word.startswith("--")} == offered


def test_the_script_defines_the_command_it_completes(tmp_path: Path) -> None:
    script = cli("completion", "bash", cwd=tmp_path).stdout
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script}\nreranker --version"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == cli("--version", cwd=tmp_path).stdout


def test_another_shell_is_refused(tmp_path: Path) -> None:
    err = cli("completion", "tcsh", cwd=tmp_path, code=2).stderr
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["fish"]])
def test_an_error_names_the_shells(words: list[str], tmp_path: Path) -> None:
    error = cli("completion", *words, cwd=tmp_path, code=2).stderr
    assert error.count("\n") == 1
    assert "bash" in error
    assert "zsh" in error
