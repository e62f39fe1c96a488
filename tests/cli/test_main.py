"""Arguments, environment, streams and exit codes of `python -m reranker`, and `check`."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from config import Settings
from reranker.cli.options import option
from reranker.engine.checkpoint.weights import Weights
from reranker.engine.scorer import DEMO, Scorer
from reranker.engine.warmup import measure
from reranker.settings import ModelSettings, keyword
from reranker.types import RerankRequest, Slice
from tests.cli.command import COMMAND, cli, environment, read_lines, run_process, stub, write_lines
from tests.conftest import ROOT
from tests.test_imports import COMPUTE, WEB

SERVICE = {"config", "app", "reranker.http", "reranker.server", "reranker.scheduler"} | WEB - {"pydantic", "dotenv"}


def test_torch_comes_with_a_model_only_and_the_service_never() -> None:
    code = (
        "import sys, reranker.cli.main, reranker.cli.rank, reranker.cli.batch, reranker.cli.check, "
        "reranker.cli.evaluate, reranker.rankers.client; print(sorted(set(sys.modules) & set(sys.argv[1:])))"
    )
    names = [*COMPUTE, *SERVICE, "huggingface_hub"]  # the hub's client reads the values of .env when it is imported
    out = subprocess.run([sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_help_imports_no_settings() -> None:
    code = "import atexit, sys; from reranker.cli.main import run; atexit.register(lambda: print(*sys.modules)); run()"
    out = subprocess.run([sys.executable, "-c", code, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "evaluate" in out.stdout
    assert not {"pydantic", "dotenv", *COMPUTE} & set(out.stdout.split())


@pytest.mark.parametrize("field", ModelSettings.model_fields)
def test_every_model_option_is_a_setting_of_the_service_with_the_same_default(field: str) -> None:
    default = Settings.model_fields[field].default
    assert ModelSettings.model_fields[field].default == default
    assert option(field) in cli("check", "--help", cwd=ROOT).stdout
    parameter = inspect.signature(Scorer.load).parameters[keyword(field)]
    assert default == parameter.default or (default == "" and parameter.default in (None, DEMO))


def test_names_of_the_service_are_no_near_misses_for_the_command_line(tmp_path: Path) -> None:
    """It knows the names of the model's settings only, and one `.env` serves both."""
    names = [name.upper() for name in Settings.model_fields if name not in ModelSettings.model_fields]
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    (tmp_path / ".env").write_text(example + "".join(f"{name}=x\n" for name in names))
    done = run_process("rank", "q", "--token", "t", cwd=tmp_path)
    assert done.stderr == "error: --token is for a running service; give its address with --url\n"


def test_help_names_every_command(tmp_path: Path) -> None:
    out = cli("--help", cwd=tmp_path).stdout
    assert all(command in out for command in ("rank", "batch", "evaluate", "check"))


@pytest.mark.parametrize(
    ("args", "env", "says"),
    [
        (["rank"], {}, "QUERY"),
        (["rnak", "q"], {}, "rnak"),
        (["rank", "q", "d", "--top-k", "0"], {}, "at least 1"),
        (["rank", "q", "d", "--colour"], {}, "unknown arguments: --colour"),
        (["rank", " ", "d"], {}, "query must not be empty"),
        (["rank", "q", "d", "--file", "x"], {}, "not both"),
        (["rank", "q", "--file", "nowhere.txt"], {}, "cannot read nowhere.txt: No such file"),
        (["rank", "q", "d", "--device", "gpu"], {}, "--device='gpu' cannot be used; allowed: auto, cpu, cuda"),
        (["rank", "q", "d"], {"MAX_SEQ_LENGTH": "12"}, "MAX_SEQ_LENGTH='12' cannot be used"),
        (["rank", "q", "d"], {"BATCH_SIZE": "many"}, "BATCH_SIZE='many' cannot be used"),
        (["rank", "q", "d"], {"MAX_SEQ_LENGTH": "999999"}, "128 to 131072"),
        (
            ["rank", "q", "d"],
            {"MODEL_DEVICE": '"gpu"  # mine'},
            "MODEL_DEVICE='gpu' cannot be used; allowed: auto, cpu, cuda",
        ),
        (["rank", "q", "d"], {"MODEL_NAME_OR_PATH": "https://huggingface.co/Qwen/X/tree/main"}, "use Qwen/X"),
        (["rank", "q", "d", "--model", "hf-mirror.com/Qwen/X"], {}, "use Qwen/X and HF_ENDPOINT=https://hf-mirror.com"),
        (["rank", "q", "d", "--model", "https://modelscope.cn/models/Qwen/X"], {}, "--model='https://modelscope.cn/"),
        (
            ["rank", "q", "d", "--revision", "x" * 300],
            {},
            "(300 characters) cannot be used; allowed: at most 255 characters",
        ),
        (
            ["rank", "q", "d"],
            {"DEFAULT_INSTRUCTION": "x" * 5000},
            "'... (5000 characters) cannot be used; allowed: at most 4096",
        ),
        (["rank", "q", "d"], {"MODEL_DEVICE": '"cpu'}, "MODEL_DEVICE in the environment cannot be used; it opens with"),
        (["rank", "q", "d", "--url", "localhost:1"], {}, "write it like http://"),
        (["rank", "q", "d", "--url", "http://h", "--precision", "fp16"], {}, "--precision has no effect with --url"),
        (["rank", "q", "d", "--token", "t"], {}, "--url"),
        (["batch", "nowhere.jsonl", "out.jsonl"], {}, "nowhere.jsonl does not exist"),
        (["evaluate"], {}, "--beir"),
        (["rank", "q", "--file", ""], {}, "--file='' names no file"),
        (["rank", "q", "d", "--file", ""], {}, "--file='' names no file"),
        (["rank", "q", "--file", "a", "--file", "b"], {}, "--file is given twice; give it once"),
        (["rank", "q", "d", "--top-k", "1", "--top-k=2"], {}, "--top-k is given twice"),
        (["rank", "q", "d", "--dev", "cpu", "--device", "cpu"], {}, "--device is given twice"),
        (["rank", "q", "d", "--field", ""], {}, "--field is for --file and standard input"),
        (["evaluate", "--beir", "nowhere"], {}, "is it a BEIR folder?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_line_and_exit_code_2(args: list[str], env: dict[str, str], says: str, tmp_path: Path) -> None:
    err = cli(*args, cwd=tmp_path, code=2, env=env).stderr
    assert says in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("place", range(1, 5))
@pytest.mark.parametrize("command", ["rank q d --instruction=i", "batch a.jsonl b.jsonl --field=x"])
def test_an_argument_that_is_no_text_is_refused(command: str, place: int, tmp_path: Path) -> None:
    words = command.split()
    words[place - 1] += os.fsdecode("压缩".encode("gbk"))
    err = cli(*words, cwd=tmp_path, code=2).stderr
    assert err.startswith(f"error: argument {place} is not UTF-8; convert it, or write it to a file")
    assert err.count("\n") == 1


def test_an_argument_outside_the_encoding_of_the_locale_is_refused(tmp_path: Path) -> None:
    changes = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_process("rank", "压缩", "d", cwd=tmp_path, env=changes)
    assert done.returncode == 2
    assert done.stderr.startswith("error: argument 2 is not ASCII, the encoding of this locale; set LC_ALL=C.UTF-8")


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("args", "redirect", "code", "says"),
    [
        ("rank q", "<&-", 2, "error: standard input is closed; name a file"),
        ("rank q --file -", "<&-", 2, "error: standard input is closed; name a file"),
        ("rank q d", ">&-", 1, "error: standard output is closed; the result has no place to go"),
        ("check", ">&-", 1, "error: standard output is closed; the result has no place to go"),
        ("rank q d --url", ">/dev/full", 1, "error: cannot write standard output: No space left on device"),
        ("rank q --file long.txt --url", ">/dev/full", 1, "error: cannot write standard output: No space left"),
        ("rank q d --output table --url", ">/dev/full", 1, "error: cannot write standard output: No space left"),
        ("check --url", ">/dev/full", 1, "error: cannot write standard output: No space left on device"),
        ("--help", ">/dev/full", 1, "error: cannot write standard output: No space left on device"),
        ("--version", ">/dev/full", 1, "error: cannot write standard output: No space left on device"),
    ],
)
def test_a_closed_or_full_stream_is_one_line(
    args: str, redirect: str, code: int, says: str, unbuffered: str, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("word " * 20_000)
    with stub() as service:
        command = f"{' '.join(COMMAND)} {args}{f' {service.url}' if args.endswith('--url') else ''} {redirect}"
        env = environment(PYTHONUNBUFFERED=unbuffered)
        done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=env, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr.count(b"\n")) == (code, 1)
    assert done.stderr.decode().startswith(says)


def test_what_is_meant_for_a_closed_standard_error_goes_nowhere(tmp_path: Path) -> None:
    write_lines(tmp_path / "d.jsonl", [{"text": "d", "title": "t"}])
    write_lines(tmp_path / "in.jsonl", [{"query": "q", "document": "d"}])
    with stub() as service:
        for args in ("rank q --file d.jsonl", "batch in.jsonl out.jsonl"):
            command = f"{' '.join(COMMAND)} {args} --url {service.url} {'>&-' if 'batch' in args else ''} 2>&-"
            done = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment(), capture_output=True)
            assert done.returncode == 0
            assert not done.stdout or [row["text"] for row in json.loads(done.stdout)] == ["d"]
    assert read_lines(tmp_path / "out.jsonl") == [{"line": 1, "id": None, "score": 0.5}]


def test_the_environment_file_gives_defaults_and_the_command_line_overrides_them(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("BATCH_SIZE=none  # a comment\nMODEL_DEVICE=cpu  # a comment\n")
    assert "BATCH_SIZE='none' cannot be used" in cli("rank", "q", "d", cwd=tmp_path, code=2).stderr
    assert "--device='x'" in cli("rank", "q", "d", "--batch-size", "3", "--device", "x", cwd=tmp_path, code=2).stderr
    both = cli("rank", "q", "d", "--device", "x", cwd=tmp_path, code=2).stderr.splitlines()
    assert sorted(line.partition("=")[0] for line in both) == ["error: --device", "error: BATCH_SIZE"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"PORT=1\nMODEL_DEVICE: cpu\n", ".env line 2 cannot be read: write MODEL_DEVICE=value"),
        (b'ACCESS_TOKEN="s3cret\n', ".env line 1 cannot be read: ACCESS_TOKEN has a value that opens with a quote"),
        ("# 端口\nPORT=1\n".encode("gbk"), ".env is not UTF-8 (line 1; it looks like GB18030): save it as UTF-8"),
        ("PORT=1\n".encode("utf-16"), ".env is not UTF-8 (line 1; it looks like UTF-16): save it as UTF-8"),
    ],
)
def test_an_environment_file_that_cannot_be_read_is_one_line(data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes(data)
    err = cli("rank", "q", "d", cwd=tmp_path, code=2).stderr
    assert err.startswith(f"error: {says}")
    assert err.count("\n") == 1
    assert "s3cret" not in err


def test_a_misspelt_name_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("MODEL_PRECISON=fp16\nACCES_TOKEN=s3cret\n")
    err = cli("rank", "q", "d", "--url", "x", cwd=tmp_path, code=2, env={"MAX_SEQ_LEN": "512"}).stderr
    assert err.splitlines()[:-1] == [
        "warning: MODEL_PRECISON in .env is not a setting; did you mean MODEL_PRECISION?",
        "warning: ACCES_TOKEN in .env is not a setting; did you mean ACCESS_TOKEN?",
        "warning: MAX_SEQ_LEN in the environment is not a setting; did you mean MAX_SEQ_LENGTH?",
    ]


@pytest.mark.parametrize("value", ["'s3cret'", '"s3cret,other"  # first, second', "s3cret  # the token"])
def test_the_token_means_the_same_as_for_the_service(value: str, tmp_path: Path) -> None:
    for given in ("file", "environment"):
        (tmp_path / ".env").write_text(f"ACCESS_TOKEN={value}\n" if given == "file" else "")
        with stub() as service:
            env = {"ACCESS_TOKEN": value} if given == "environment" else {}
            cli("rank", "q", "d", "--url", service.url, cwd=tmp_path, env=env)
        assert service.authorization == ["Bearer s3cret"]


def test_a_missing_evaluation_package_is_named_with_its_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "ir_measures" else find(name))
    err = cli("evaluate", "--beir", "x", cwd=tmp_path, code=1).stderr
    assert err == f"error: ir_measures missing: {sys.executable} -m pip install -r requirements-eval.txt\n"


def test_check_says_what_was_chosen(model_path: Path, tmp_path: Path) -> None:
    env = {
        "MODEL_NAME_OR_PATH": f"'{model_path}'   # ours",
        "MODEL_PRECISION": "fp32  # a comment",
        "MAX_BATCH_TOKENS": "auto",
    }
    done = cli("check", "--device", "cpu", "--max-seq-length", 512, cwd=tmp_path, env=env)
    assert done.stderr.startswith(f"loading {model_path} (cpu)...\n")
    facts = json.loads(done.stdout)
    assert facts["status"] == "ok"
    assert (facts["model"], facts["device"], facts["precision"]) == (str(model_path), "cpu", "float32")
    assert facts["max_seq_length"] == 512
    assert facts["max_batch_tokens"] >= 1024
    assert 0 < facts["score"] < 1


@pytest.mark.parametrize("broken", ["model.safetensors", "tokenizer.json"])
def test_check_of_a_broken_folder_is_one_line_and_exit_code_1(broken: str, tmp_path: Path) -> None:
    folder = shutil.copytree(DEMO, tmp_path / "broken")
    whole = (folder / broken).read_bytes()
    (folder / broken).write_bytes(whole[: len(whole) // 2])
    err = cli("check", "--model", folder, cwd=tmp_path, code=1).stderr
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert err.endswith(lines[0] + "\n")


def plan(*args: object, cwd: Path, env: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """Return what `check --plan` says of one model, by precision."""
    done = cli("check", "--plan", *args, cwd=cwd, env=env)
    return {row["precision"]: row for row in json.loads(done.stdout)["models"]}


def test_the_plan_is_what_loading_takes(model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer.load(model_path, device="cpu", precision="float32")
    decoder: Any = scorer.model.backbone.decoder  # type: ignore[attr-defined]
    cached = [tensor for name, tensor in decoder.named_buffers() if "cached" in name]
    tokens = scorer.pack([Slice(scorer.encode(RerankRequest("q", ["d"] * 9)), 0, 9)])

    def read(*args: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Weights, "_read", read)
    planned = plan("--model", model_path, cwd=tmp_path)
    assert list(planned) == ["float32", "bfloat16", "float8", "int8"]
    row = planned["float32"]
    assert row["weights_bytes"] == sum(tensor.nbytes for tensor in decoder.parameters())
    assert row["prefix_bytes"] == sum(tensor.nbytes for tensor in cached)
    assert row["batch_bytes"] == 1024 * measure(scorer, tokens).bytes_per_token
    assert row["needed_bytes"] == row["weights_bytes"] + row["batch_bytes"] + row["prefix_bytes"]
    wide, narrow = planned["bfloat16"], planned["int8"]
    assert row["weights_bytes"] > wide["weights_bytes"] > narrow["weights_bytes"]
    assert narrow["loading_bytes"] > 0


def test_the_plan_of_an_official_model_needs_no_file(tmp_path: Path) -> None:
    model = ("--model", "Qwen/Qwen3-Reranker-4B")
    planned = plan(*model, cwd=tmp_path)
    assert {size for size, fits in planned["bfloat16"]["fits"].items() if not fits} == {"8"}
    assert all(planned["int8"]["fits"].values())
    assert 4.0e9 < planned["int8"]["weights_bytes"] < 4.6e9
    assert list(plan(*model, "--precision", "fp16", cwd=tmp_path)) == ["bfloat16"]
    [half] = plan(*model, cwd=tmp_path, env={"MAX_MEMORY_PERCENTAGE": "50", "MODEL_PRECISION": "bf16"}).values()
    assert [size for size, fits in half["fits"].items() if fits] == ["24", "48", "80"]
    prefix = json.loads((ROOT / "benchmarks" / "tokens.json").read_text())["static_prefix"]
    assert planned["bfloat16"]["prefix_bytes"] == prefix * 36 * 2 * 8 * 128 * 2


def test_a_plan_downloads_nothing_and_is_for_a_gpu(tmp_path: Path) -> None:
    err = cli("check", "--plan", "--model", "no-one/no-model", cwd=tmp_path, code=1).stderr
    assert err.startswith("error: cannot download no-one/no-model: ")
    assert err.count("\n") == 1
    assert "leave out --url" in cli("check", "--plan", "--url", "http://127.0.0.1:9", cwd=tmp_path, code=2).stderr
    done = cli("check", "--plan", "--device", "cpu", cwd=tmp_path)
    assert done.stderr == "note: the plan is for GPUs; the device cpu has no part in it\n"
    assert len(json.loads(done.stdout)["models"]) == 12
