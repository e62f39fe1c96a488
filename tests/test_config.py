from __future__ import annotations

import logging
import logging.config
import os
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from config import Settings, SettingsError, load_settings, log_config, misspelt
from tests.conftest import ROOT

LEGACY = (Path(__file__).parent / "legacy.env").read_text()


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Restore the environment, into which load_settings exports."""
    before = dict(os.environ)
    for name in Settings.model_fields:
        os.environ.pop(name.upper(), None)
    yield
    os.environ.clear()
    os.environ.update(before)


def load(tmp_path: Path, text: str = "") -> Settings:
    (tmp_path / ".env").write_text(text, encoding="utf-8")
    return load_settings(tmp_path / ".env")


def test_the_defaults() -> None:
    settings = load_settings("/nonexistent/.env")
    assert (settings.host, settings.port, settings.workers) == ("0.0.0.0", 6006, 1)
    assert (settings.timeout, settings.keep_alive, settings.worker_connections) == (120, 5, 1000)
    assert (settings.model_device, settings.model_precision) == ("auto", "auto")
    assert (settings.max_memory_percentage, settings.batch_size, settings.max_seq_length) == (90, None, 8192)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


def test_the_file_of_existing_deployments_is_in_force(tmp_path: Path) -> None:
    settings = load(tmp_path, LEGACY)
    assert settings.model_dump() == Settings().model_dump()
    assert (settings.host, settings.port, settings.workers) == ("0.0.0.0", 6006, 1)
    assert settings.worker_class == "uvicorn.workers.UvicornWorker"
    assert (settings.worker_connections, settings.timeout, settings.keep_alive) == (1000, 120, 5)
    assert settings.model_name_or_path == "./models/Qwen3-Reranker-4B"
    assert (settings.model_device, settings.model_precision) == ("cuda", "bfloat16")
    assert (settings.max_memory_percentage, settings.batch_size, settings.max_seq_length) == (50, 1, 256)
    assert settings.log_level == "INFO"
    assert settings.log_format == "%(asctime)s - %(name)s - %(levelname)s - %(message)s"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:128"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("PORT=70000", ["PORT='70000'", "0 to 65535"]),
        ("PORT=http", ["PORT='http'", "0 to 65535"]),
        ("WORKERS=0", ["WORKERS='0'", "1 to 256 or auto"]),
        ("WORKERS=many", ["WORKERS='many'", "auto"]),
        ("WORKER_CLASS=gthread", ["WORKER_CLASS='gthread'", "uvicorn.workers.UvicornWorker", "cannot run an ASGI"]),
        ("WORKER_CLASS=asgi", ["before the model is loaded"]),
        ("MODEL_DEVICE=gpu", ["MODEL_DEVICE='gpu'", "auto, cpu, cuda or cuda:N"]),
        ("MODEL_DEVICE=cuda:x", ["MODEL_DEVICE='cuda:x'"]),
        ("MODEL_PRECISION=bfloat", ["MODEL_PRECISION='bfloat'", "bfloat16", "fp32"]),
        ("MAX_MEMORY_PERCENTAGE=0.5", ["MAX_MEMORY_PERCENTAGE='0.5'", "1 to 100"]),
        ("BATCH_SIZE=-1", ["BATCH_SIZE='-1'", "1 to 65536 or auto"]),
        ("MAX_SEQ_LENGTH=16", ["MAX_SEQ_LENGTH='16'", "128 to"]),
        ("SCORE_CACHE_ENTRIES=-1", ["SCORE_CACHE_ENTRIES='-1'", "0 to 10000000"]),
        ("REQUEST_TIMEOUT=0", ["REQUEST_TIMEOUT='0'", "above 0"]),
        ("LOG_LEVEL=LOUD", ["LOG_LEVEL='LOUD'", "DEBUG, INFO"]),
        ("LOG_FORMAT={message}", ["LOG_FORMAT='{message}'", "%-style"]),
        ("LOG_FORMAT=%(nonsense)s", ["nonsense"]),
        ("ACCESS_TOKEN='two words'", ["ACCESS_TOKEN=(hidden)", "without spaces"]),
        ("ACCESS_TOKEN=' , '", ["ACCESS_TOKEN=(hidden)", "no token between the commas"]),
        ("ACCESS_TOKEN=schlüssel", ["ACCESS_TOKEN=(hidden)", "ASCII"]),
        ("TOKENIZERS_PARALLELISM=maybe", ["TOKENIZERS_PARALLELISM='maybe'", "allowed: true, false"]),
        ("LOG_LEVEL=WARN", ["allowed: DEBUG, INFO, WARNING, ERROR, CRITICAL"]),
        ("MODEL_PRECISION=int4", ["allowed: auto, bfloat16, float16, float32, int8, float8, bf16, fp16, fp32, fp8"]),
        ("HOST=0.0.0.0:7000", ["HOST='0.0.0.0:7000'", "such as 0.0.0.0", "the port is PORT"]),
        ("HOST=http://localhost", ["HOST='http://localhost'", "an address or a name alone"]),
        ("HOST=not a host", ["HOST='not a host'", "an address or a name alone"]),
        ("HOST=::g", ["HOST='::g'"]),
        ("ACCESS_TOKEN=$(openssl rand -hex 32)", ["ACCESS_TOKEN=(hidden)", "only a shell replaces $", "openssl rand"]),
        ("ACCESS_TOKEN=$TOKEN", ["only a shell replaces $"]),
        ("ACCESS_TOKEN=a, schlüssel2=s3cr3t", ["(hidden)", "ASCII"]),
        ("ACCESS_TOKEN=a, two words2=s3cr3t", ["(hidden)", "without spaces"]),
        (f"ACCESS_TOKEN=搜索={'x' * 16}", ["(hidden)", "ASCII", "in name=token the name is a-z"]),
        ("ACCESS_TOKEN=a, S3cr3t=s3cr3t", ["ACCESS_TOKEN=(hidden)", "entry 2", "name=token", "write unnamed="]),
        (f"ACCESS_TOKEN=a={'x' * 16},b={'x' * 16}", ["(hidden)", "entry 2 repeats the token of another caller"]),
        (f"ACCESS_TOKEN={'x' * 16_385}", ["(hidden)", "at most 16384 characters"]),
        ("MODEL_NAME_OR_PATH=https://huggingface.co/Qwen/Qwen3-Reranker-4B/tree/main", ["use Qwen/Qwen3-Reranker-4B"]),
        (
            f"DEFAULT_INSTRUCTION={'secret ' * 1000}",
            ["secret", "... (6999 characters)", "allowed: at most 4096 characters"],
        ),
        (f"MODEL_NAME_OR_PATH={'x' * 5000}", ["(5000 characters)", "at most 4096 characters"]),
        (f"MODEL_REVISION={'x' * 300}", ["(300 characters)", "at most 255 characters"]),
        (f"HOST={'x' * 300}", ["(300 characters)", "at most 255 characters"]),
        (f"LOG_FORMAT={'x' * 5000}", ["(5000 characters)", "at most 4096 characters"]),
        (f"PORT={'1' * 5000}", ["(5000 characters)", "0 to 65535"]),
        (f"WORKER_CLASS={'x' * 5000}", ["(5000 characters)", "uvicorn.workers.UvicornWorker"]),
        ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments", ["write option:value", "expandable_segments:True"]),
        ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments=True", ["write option:value"]),
        ("PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:128,", ["write option:value"]),
        ("PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:128 backend:native", ["write option:value"]),
        ("PYTORCH_CUDA_ALLOC_CONF=max_split_size:128", ["did you mean max_split_size_mb?"]),
        ("PYTORCH_CUDA_ALLOC_CONF=Expandable_Segments:True", ["did you mean expandable_segments?"]),
        ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:true", ["True or False"]),
        ("ACCESS_LOG_CLIENT=all", ["ACCESS_LOG_CLIENT='all'", "allowed: none, peer, forwarded"]),
        ("TRUSTED_PROXIES=10.0.0.1/8", ["TRUSTED_PROXIES='10.0.0.1/8'", "has host bits set", "such as 10.0.0.0/8"]),
        ("TRUSTED_PROXIES=*", ["TRUSTED_PROXIES='*'", "write addresses or networks"]),
        ("CORS_ALLOW_ORIGINS=app.example", ["CORS_ALLOW_ORIGINS='app.example'", "scheme://host"]),
        ("CORS_ALLOW_ORIGINS=https://app.example/", ["a slash at its end"]),
        ("CORS_ALLOW_ORIGINS=https://a,https://app.example/page", ["without a path"]),
        ("CORS_ALLOW_ORIGINS=https://*.example", ["wildcard"]),
        ("CORS_ALLOW_ORIGINS=null", ["scheme://host"]),
        ("CORS_ALLOW_ORIGINS=http://a:70000", ["scheme://host:port"]),
        ("CORS_ALLOW_ORIGINS=https://me@app.example", ["scheme://host"]),
        ("CORS_ALLOW_ORIGINS='https://a https://b'", ["scheme://host"]),
        ("CORS_ALLOW_ORIGINS=https://münchen.example", ["ASCII"]),
        ("CORS_ALLOW_ORIGINS=*,https://a", ["stands alone"]),
        ("CORS_ALLOW_ORIGINS=' , '", ["no origin between the commas"]),
    ],
)
def test_a_wrong_value_is_one_line_that_helps(tmp_path: Path, line: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, line)
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(f" (set in {tmp_path}/.env line 1)")
    assert len(message) < 400 + len(str(tmp_path))
    for word in words:
        assert word in message
    assert "schlüssel" not in message
    assert "two words" not in message


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("WORKERS=auto", "workers", None),
        ("BATCH_SIZE=auto", "batch_size", None),
        ("BATCH_SIZE=", "batch_size", None),
        ("MODEL_DEVICE=CUDA:1", "model_device", "cuda:1"),
        ("MODEL_PRECISION=BF16", "model_precision", "bf16"),
        ("LOG_LEVEL=debug", "log_level", "DEBUG"),
        ("WORKER_CLASS=uvicorn_worker.UvicornWorker", "worker_class", "uvicorn_worker.UvicornWorker"),
        ("ACCESS_TOKEN= old , new,", "access_token", "old,new"),
        ("ACCESS_TOKEN=", "access_token", ""),
        (f"ACCESS_TOKEN=search={'x' * 16} , old==", "access_token", f"search={'x' * 16},old=="),
        ("ACCESS_TOKEN=' '", "access_token", ""),
        ("CORS_ALLOW_ORIGINS=", "cors_allow_origins", ""),
        ("CORS_ALLOW_ORIGINS=*", "cors_allow_origins", "*"),
        (
            "CORS_ALLOW_ORIGINS=https://App.example , http://localhost:3000,",
            "cors_allow_origins",
            "https://app.example,http://localhost:3000",
        ),
        (
            "CORS_ALLOW_ORIGINS=https://app.example:443,http://[::1]:80",
            "cors_allow_origins",
            "https://app.example,http://[::1]",
        ),
        (
            "CORS_ALLOW_ORIGINS=http://a:080,http://b:08080,https://c:00443,http://[::1]:03000",
            "cors_allow_origins",
            "http://a,http://b:8080,https://c,http://[::1]:3000",
        ),
        ("CORS_ALLOW_ORIGINS=chrome-extension://abc", "cors_allow_origins", "chrome-extension://abc"),
        ("ACCESS_LOG_CLIENT=Peer", "access_log_client", "peer"),
        ("TRUSTED_PROXIES=192.0.2.7 , 10.0.0.0/8,", "trusted_proxies", "192.0.2.7/32,10.0.0.0/8"),
        ("TRUSTED_PROXIES=::ffff:10.0.0.0/104,::/0", "trusted_proxies", "10.0.0.0/8,::/0"),
        ("PORT=", "port", 6006),
        ("PORT='7000'  # mine", "port", 7000),
        ('MODEL_NAME_OR_PATH="./my models/x"', "model_name_or_path", "./my models/x"),
        ("DEFAULT_INSTRUCTION='Find C# # code'", "default_instruction", "Find C# # code"),
        ("HOST=[::1]", "host", "::1"),
        ("HOST=localhost", "host", "localhost"),
        ("ACCESS_TOKEN=pa$$word", "access_token", "pa$$word"),
        ("TOKENIZERS_PARALLELISM=True", "tokenizers_parallelism", "true"),
        ("PYTORCH_CUDA_ALLOC_CONF=max_split_size_mb:128", "pytorch_cuda_alloc_conf", "max_split_size_mb:128"),
        (
            "PYTORCH_CUDA_ALLOC_CONF=backend:native, roundup_power2_divisions:[256:1,512:2,>:8], a_new_one:0.5",
            "pytorch_cuda_alloc_conf",
            "backend:native,roundup_power2_divisions:[256:1,512:2,>:8],a_new_one:0.5",
        ),
    ],
)
def test_spellings_that_are_accepted(tmp_path: Path, line: str, name: str, value: object) -> None:
    assert getattr(load(tmp_path, line), name) == value


def test_all_wrong_values_are_reported_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODEL_DEVICE", '"cpu')
    monkeypatch.setenv("HF_ENDPOINT", "mirror")
    with pytest.raises(SettingsError) as caught:
        load(tmp_path, "PORT=70000\nACCESS_TOKEN=two words secret\nBATCH_SIZE=few\nACCES_TOKEN=x\nLOG_LEVEL=INFO\n")
    lines = caught.value.report.splitlines()
    assert sorted(
        line.removeprefix("error: ").partition(" cannot be used; ")[0].partition(" is ")[0] for line in lines
    ) == [
        "ACCESS_TOKEN=(hidden)",
        "BATCH_SIZE='few'",
        "HF_ENDPOINT='mirror'",
        "MODEL_DEVICE in the environment",
        "PORT='70000'",
    ]
    assert all(line.startswith("error: ") for line in lines)
    assert "secret" not in str(caught.value)


def test_a_name_close_to_the_token_is_reported_with_wrong_values(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^ACCES_TOKEN in .*\nPORT='x' cannot be used; [^\n]*$"):
        load(tmp_path, "ACCES_TOKEN=s3cret\nPORT=x\n")


def test_a_forwarded_address_needs_the_proxies_that_may_report_it(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^TRUSTED_PROXIES='' cannot be used; ACCESS_LOG_CLIENT=forwarded needs"):
        load(tmp_path, "ACCESS_LOG_CLIENT=forwarded")
    assert load(tmp_path, "ACCESS_LOG_CLIENT=forwarded\nTRUSTED_PROXIES=::1").trusted_proxies == "::1/128"


def test_a_comment_that_docker_left_in_the_value_is_cut(tmp_path: Path) -> None:
    os.environ["MODEL_DEVICE"] = "cuda  # auto, cuda, cpu"
    os.environ["PORT"] = "7003 # mine"
    settings = load(tmp_path)
    assert (settings.model_device, settings.port) == ("cuda", 7003)


def test_the_environment_wins_over_the_file_and_strangers_are_exported(tmp_path: Path) -> None:
    os.environ["PORT"] = "7001"
    settings = load(tmp_path, "PORT=7002\nHF_ENDPOINT=https://mirror.example\nSOMETHING_ELSE=1\n")
    assert settings.port == 7001
    assert os.environ["HF_ENDPOINT"] == "https://mirror.example"


def test_a_name_that_looks_like_a_setting_is_reported(tmp_path: Path) -> None:
    file = tmp_path / ".env"
    file.write_text("MAX_BATCH_TOKEN=5\nHF_ENDPOINT=https://y\nPORT=1\nEDITOR=vi\n")
    os.environ["MODEL_PRECISON"] = "fp16"
    load_settings(file)
    assert misspelt(file) == [
        f"MAX_BATCH_TOKEN in {file} is not a setting; did you mean MAX_BATCH_TOKENS?",
        "MODEL_PRECISON in the environment is not a setting; did you mean MODEL_PRECISION?",
    ]


@pytest.mark.parametrize("place", ["file", "environment"])
def test_a_name_close_to_the_token_s_stops_the_start(tmp_path: Path, place: str) -> None:
    if place == "environment":
        os.environ["ACCES_TOKEN"] = "s3cret"
    with pytest.raises(
        SettingsError, match=r"^ACCES_TOKEN in .* is not a setting; did you mean ACCESS_TOKEN\?"
    ) as caught:
        load(tmp_path, "ACCES_TOKEN=s3cret\n" if place == "file" else "")
    assert "s3cret" not in str(caught.value)


def test_a_name_close_to_the_token_s_is_a_warning_where_a_token_is_set(tmp_path: Path) -> None:
    settings = load(tmp_path, "ACCESS_TOKEN=mine\nACCESS_TOKENS=s3cret\n")
    assert settings.access_token == "mine"
    assert misspelt(tmp_path / ".env") == [
        f"ACCESS_TOKENS in {tmp_path / '.env'} is not a setting; did you mean ACCESS_TOKEN?"
    ]


def test_the_source_of_a_value_is_known(tmp_path: Path) -> None:
    os.environ["HOST"] = "127.0.0.1"
    settings = load(tmp_path, "\nPORT=7001\n")
    assert settings.source("host") == "the environment"
    assert settings.source("port") == f"{tmp_path}/.env line 2"
    assert settings.source("workers") == "the default"


def test_the_token_is_not_shown() -> None:
    os.environ["ACCESS_TOKEN"] = "s3cret"
    assert "s3cret" not in repr(load_settings("/nonexistent/.env"))


def test_the_log_format_is_in_force(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    settings = load(tmp_path, "LOG_FORMAT=[%(levelname)s] %(message)s\nLOG_LEVEL=WARNING")
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    try:
        logging.config.dictConfig(log_config(settings))
        for name in ("gunicorn.error", "uvicorn.error", "reranker"):
            logging.getLogger(name).warning("from %s", name)
            logging.getLogger(name).info("not this")
    finally:
        root.handlers, root.level = handlers, level
    lines = capfd.readouterr().err.splitlines()
    assert lines == ["[WARNING] from gunicorn.error", "[WARNING] from uvicorn.error", "[WARNING] from reranker"]


def test_the_default_format_names_the_zone_of_its_times() -> None:
    config = log_config(Settings())["formatters"]["default"]
    logger = logging.config.DictConfigurator({}).configure_formatter(dict(config))
    line = logger.format(logging.makeLogRecord({"created": 1.5, "name": "a", "levelname": "INFO", "msg": "b"}))
    time, *rest = line.split(" - ")
    assert re.fullmatch(r"19(69|70)-\d\d-\d\d \d\d:\d\d:\d\d\.500[+-]\d\d:\d\d", time)
    assert datetime.fromisoformat(time).timestamp() == 1.5
    assert rest == ["a", "INFO", "b"]


DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


def shown(value: object) -> str:
    return {None: "auto", "": ""}.get(value, str(value))  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("page", ["settings.md", "settings.zh-CN.md"])
def test_the_documents_list_every_setting_with_its_default(page: str) -> None:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([A-Z_]+)` \|\s*`?([^|`]*)`?\s*\|", text, re.M)
    table = {name.lower(): default.strip() for name, default in rows}
    assert set(table) == set(DEFAULTS)
    for name, default in DEFAULTS.items():
        assert table[name] == shown(default), name


def test_the_example_file_lists_every_setting_with_its_default() -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    lines = dict(re.findall(r"^#? ?([A-Z_]+)=(.*)$", text, re.M))
    assert {name for name in lines if name.lower() in DEFAULTS} == {name.upper() for name in DEFAULTS}
    for name, default in DEFAULTS.items():
        assert re.sub(r"\s+#.*", "", lines[name.upper()]).strip() == shown(default), name


def test_a_copied_example_file_changes_nothing(tmp_path: Path) -> None:
    settings = load(tmp_path, (ROOT / ".env.example").read_text(encoding="utf-8"))
    assert settings.model_dump() == DEFAULTS
