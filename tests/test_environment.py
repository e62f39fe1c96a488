"""One set of rules for every setting, whoever passes it on: `.env`, `docker run --env-file`, the shell."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from dotenv import dotenv_values
from hypothesis import given, settings
from hypothesis import strategies as st

from config import Settings
from reranker.environment import (
    ENVIRONMENT,
    LIBRARY_VARIABLES,
    SETTINGS,
    SettingsError,
    clean,
    closest,
    load,
    near_misses,
    quote,
    read_env_file,
    shorten,
)
from reranker.settings import url_problem
from tests.cli.command import environment
from tests.conftest import ROOT


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    for name in [name for name in os.environ if name.upper() in SETTINGS or name in LIBRARY_VARIABLES]:
        del os.environ[name]
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / ".env"


def test_the_names_are_those_of_the_service() -> None:
    assert {name.lower() for name in SETTINGS} == set(Settings.model_fields)


# Values: what stands behind NAME= in a file, and what it means

VALUES = [
    ("secret", "secret"),
    ('"secret"', "secret"),
    ("'secret'", "secret"),
    ("  secret  ", "secret"),
    ('  "secret"  # the token', "secret"),
    ("secret  # the token", "secret"),
    ("secret\t# the token", "secret"),
    ("new#1, old", "new#1, old"),
    ("#1", "#1"),
    ("  # no value", ""),
    ("", ""),
    ('""', ""),
    ("' '", ""),
    ('"Find C# code # not C"', "Find C# code # not C"),
    ("'Find C# code # not C'  # a comment with 'quotes'", "Find C# code # not C"),
    ('"a\\"b"', 'a"b'),
    ("'it\\'s'", "it's"),
    ("it's # said", "it's"),
    ('5" screens', '5" screens'),
    ("\"'inner'\"", "'inner'"),
    ("'\"inner\"'", '"inner"'),
    ("'\"inner # \"'", '"inner # "'),
    ("%(asctime)s - %(message)s", "%(asctime)s - %(message)s"),
    ('"%(levelname)s # %(message)s"', "%(levelname)s # %(message)s"),
    ("资料 # 注释", "资料"),
    ("C:\\new", "C:\\new"),
    ('"“typographic”"', "“typographic”"),
    ("“one” and “two”", "“one” and “two”"),
]


@pytest.mark.parametrize(("raw", "text"), VALUES)
def test_a_value_means_the_same_whoever_passes_it_on(file: Path, raw: str, text: str) -> None:
    file.write_text(f"DEFAULT_INSTRUCTION={raw}\n", encoding="utf-8")
    from_file = load(file).get("DEFAULT_INSTRUCTION")
    os.environ["DEFAULT_INSTRUCTION"] = raw  # docker run --env-file passes on what follows the =
    from_environment = load(file.with_name("none")).get("DEFAULT_INSTRUCTION")
    assert (from_file.text if from_file else "") == text
    assert (from_environment.text if from_environment else "") == text


@pytest.mark.parametrize(("raw", "text"), VALUES)
@pytest.mark.parametrize("passed", ["file", "environment"])
def test_a_process_that_inherits_the_environment_reads_the_same(
    tmp_path: Path, raw: str, text: str, passed: str
) -> None:
    """A worker and a replica of Ray read again what their parent exported: quotes inside quotes stay."""
    if passed == "file":
        (tmp_path / ".env").write_text(f"DEFAULT_INSTRUCTION={raw}\nHF_HOME='/a #b'\n", encoding="utf-8")
    else:
        os.environ |= {"DEFAULT_INSTRUCTION": raw, "HF_HOME": "'/a #b'"}
    for _ in range(3):
        values = load(tmp_path / ".env")
        assert (values["DEFAULT_INSTRUCTION"].text if text else "") == text
        assert ("DEFAULT_INSTRUCTION" in values) == bool(text)
        if passed == "file":
            assert os.environ["HF_HOME"] == "/a #b"


def test_a_real_child_process_reads_the_same(tmp_path: Path) -> None:
    code = (
        "import json, os, subprocess, sys, config; from reranker import environment as e; v = e.load(); "
        "print(json.dumps({n: x.text for n, x in v.items()}), flush=True); "
        "deeper = int(sys.argv[1]); deeper and subprocess.run([sys.executable, '-c', sys.argv[2], str(deeper - 1), '']"
        " if deeper == 1 else [sys.executable, '-c', sys.argv[2], str(deeper - 1), sys.argv[2]], check=True)"
    )
    raw = {"DEFAULT_INSTRUCTION": "'\"one\" # two'", "LOG_FORMAT": '"%(message)s # x"', "MODEL_NAME_OR_PATH": '"./a b"'}
    out = subprocess.run(
        [sys.executable, "-c", code, "2", code],
        cwd=tmp_path,
        env=environment(**raw),
        capture_output=True,
        text=True,
        check=True,
    )
    told = [json.loads(line) for line in out.stdout.splitlines()]
    assert (
        told
        == [{"DEFAULT_INSTRUCTION": '"one" # two', "LOG_FORMAT": "%(message)s # x", "MODEL_NAME_OR_PATH": "./a b"}] * 3
    )


@settings(max_examples=300, deadline=None)
@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_what_is_exported_is_read_as_it_was(text: str) -> None:
    assert clean(quote(text.strip())).strip() == text.strip()


@pytest.mark.parametrize("text", ["plain", "two words", "a#b", "it's", "%(message)s", "C:\\new", "资料", ""])
def test_what_needs_no_quotes_gets_none(text: str) -> None:
    assert quote(text) == text


@pytest.mark.parametrize("raw", ['"secret', "'secret", '"a" b', "'a\" # c", '"a\\"', "'"])
@pytest.mark.parametrize("name", ["ACCESS_TOKEN", "DEFAULT_INSTRUCTION", "PORT", "HF_ENDPOINT"])
def test_a_quote_that_closes_nothing_is_refused_from_wherever_it_comes(file: Path, name: str, raw: str) -> None:
    file.write_text(f"# first\n{name}={raw}\n")
    with pytest.raises(SettingsError, match=r"line 2 cannot be read: .*quote") as in_file:
        load(file)
    os.environ[name] = raw
    with pytest.raises(SettingsError, match=f"^{name} in the environment cannot be used; .*quote") as in_environment:
        load(file.with_name("none"))
    assert "secret" not in str(in_file.value) + str(in_environment.value)


@pytest.mark.parametrize("raw", ["“secret”", "‘secret’", "”secret”  # a comment", "«secret»", "「secret」"])
def test_typographic_quotes_are_refused(file: Path, raw: str) -> None:
    file.write_text(f"DEFAULT_INSTRUCTION={raw}\n", encoding="utf-8")
    with pytest.raises(SettingsError, match=r"line 1: DEFAULT_INSTRUCTION .* typographic quotes"):
        load(file)
    os.environ["DEFAULT_INSTRUCTION"] = raw
    with pytest.raises(SettingsError, match=r"^DEFAULT_INSTRUCTION in the environment .* typographic quotes"):
        load(file.with_name("none"))
    file.write_text(f"OTHER={raw}\n", encoding="utf-8")
    del os.environ["DEFAULT_INSTRUCTION"]
    assert load(file) == {}


def test_the_environment_wins_unless_it_is_blank(file: Path) -> None:
    file.write_text("PORT=7002\nACCESS_TOKEN=secret\nWORKERS=2\nHF_ENDPOINT=https://a\nHF_HOME=\nOTHER=1\n")
    os.environ |= {"PORT": "7001", "ACCESS_TOKEN": "", "WORKERS": "  # two", "HF_ENDPOINT": " ", "OTHER": "2"}
    values = load(file)
    assert {name: value.text for name, value in values.items()} == {
        "PORT": "7001",
        "ACCESS_TOKEN": "secret",
        "WORKERS": "2",
    }
    assert values["PORT"].source == ENVIRONMENT
    assert values["ACCESS_TOKEN"].source == f"{file} line 2"
    assert load(file)["ACCESS_TOKEN"].source == f"{file} line 2", "also where the parent exported it"
    assert (os.environ["ACCESS_TOKEN"], os.environ["HF_ENDPOINT"], os.environ["OTHER"]) == ("secret", "https://a", "2")
    assert "HF_HOME" not in os.environ, "the hub's client takes a blank one as an address"


def test_variables_of_libraries_lose_the_quotes_that_docker_leaves(file: Path) -> None:
    os.environ |= {"HF_ENDPOINT": '"https://hf-mirror.com"  # mirror', "CUDA_VISIBLE_DEVICES": "", "OTHER": '"x"'}
    load(file)
    assert os.environ["HF_ENDPOINT"] == "https://hf-mirror.com"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "", "blank means: no GPU"
    assert os.environ["OTHER"] == '"x"', "names that are not ours are left alone"


@pytest.mark.parametrize("place", ["file", "environment"])
def test_names_in_lower_case_are_settings_too(file: Path, place: str) -> None:
    line = {"access_token": "'secret'", "Port": "7001"}
    if place == "file":
        file.write_text("".join(f"{name}={value}\n" for name, value in line.items()))
    else:
        os.environ |= line
    assert {name: value.text for name, value in load(file).items()} == {"ACCESS_TOKEN": "secret", "PORT": "7001"}
    assert os.environ["ACCESS_TOKEN"] == "secret"


# The file


@pytest.mark.parametrize(
    "text",
    [
        "A=1\nB=${A}-${MISSING}-${MISSING:-x}\nC='${A}'\nA=2\nD=${A}\n",
        "export A = 1 # c\n\n# comment\nB='two\nlines'\r\nC=\"a\\nb\"\r\n",
        "\ufeffA=1\n'B'=2\nC=#x\nD= # x\nE=\n",
        "A=${HOME}\nPORT=${PORT_OF_IT:-7000}\n",
        'KEY="-----BEGIN\nQUJD\nQ==\n-----END"\nPORT=1',
        "A.b-c=1\n",
        "",
    ],
)
def test_a_file_is_read_as_python_dotenv_reads_it(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="")
    read = {name: value.text for name, value in read_env_file(file).items()}
    assert read == dotenv_values(file, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ('ACCESS_TOKEN="s3cret\nPORT=7000\n', 1, "ACCESS_TOKEN has a value that opens with a quote"),
        ("PORT=7000\nACCESS_TOKEN: s3cret\n", 2, "write ACCESS_TOKEN=value"),
        ("PORT=7000\n\n\n  ACCESS_TOKEN\n", 4, "write ACCESS_TOKEN=value"),
        ("ACCESS_TOKEN s3cret", 1, "write ACCESS_TOKEN=value"),
        ("ACCES_TOKEN: s3cret", 1, "write ACCESS_TOKEN=value"),
        ("ACCESS_TOKEN:=s3cret", 1, "letters, digits and _ only; write ACCESS_TOKEN=value"),
        ('"ACCESS_TOKEN"=s3cret', 1, "letters, digits and _ only"),
        ("$env:ACCESS_TOKEN=s3cret", 1, "letters, digits and _ only"),
        ("- ACCESS_TOKEN=s3cret", 1, "write NAME=value"),
        ("set ACCESS_TOKEN=s3cret", 1, "write NAME=value"),
        ("ACCESS_TOKEN＝s3cret", 1, "there is no '='"),
        ("s3cret\n", 1, "there is no '='; write NAME=value"),
        ("export ACCESS_TOKEN", 1, "there is no '='"),
        ("# ok\r\nPORT 7000\r\n", 2, "write PORT=value"),
        ("PORT='7000' s3cret", 1, "PORT has a value that opens with a quote"),
        ("ACCESS_TOKEN='s3cret\nPORT=7000\nLOG_FORMAT='\n", 1, "extends over the next NAME=value"),
        ("OTHER='s3cret\nACCESS_TOKEN=\nLOG_FORMAT='\n", 1, "extends over the next NAME=value"),
        ("OTHER='s3cret\nANOTHER=1\n'\n", 1, "extends over the next NAME=value"),
        ("{", 1, "write NAME=value"),
        ("{\n", 1, "write NAME=value"),
        ("[settings]\nPORT=1", 1, "write NAME=value"),
        ("PORT=1\nsource other.env", 2, "write NAME=value"),
    ],
)
def test_a_line_that_is_no_assignment_is_named(file: Path, text: str, line: int, words: str) -> None:
    file.write_text(text, encoding="utf-8", newline="")
    with pytest.raises(SettingsError) as caught:
        load(file)
    message = str(caught.value)
    assert message.startswith(f"{file} line {line} cannot be read: ")
    assert words in message
    assert "s3cret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "works"),
    [
        ("ACCESS_TOKEN=s3cret\nACCESS_TOKEN=\n", False),
        ("ACCESS_TOKEN=s3cret\naccess_token=other\n", False),
        ("PORT=1\n# x\nPORT=2\n", False),
        ("ACCESS_TOKEN=\nPORT=1\nACCESS_TOKEN=s3cret\n", True),
        ("ACCESS_TOKEN=s3cret\nACCESS_TOKEN='s3cret'\n", True),
        ("OTHER=1\nOTHER=2\n", True),
    ],
)
def test_a_setting_that_is_set_twice_is_refused_unless_nothing_is_lost(file: Path, text: str, works: bool) -> None:
    file.write_text(text)
    if works:
        assert load(file).get("ACCESS_TOKEN") is None or load(file)["ACCESS_TOKEN"].text == "s3cret"
        return
    with pytest.raises(SettingsError, match=r"line [23] sets \w+ again and differently \(.* line 1 set it\)") as caught:
        load(file)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("blank", [False, True])
def test_a_setting_that_refers_to_nothing_is_refused(file: Path, blank: bool) -> None:
    """`ACCESS_TOKEN=${TOKEN}` would open the service where TOKEN is not set."""
    file.write_text("OTHER=${NOWHERE_SET}\nACCESS_TOKEN=${NOWHERE_SET}\n")
    if blank:
        os.environ["NOWHERE_SET"] = ""
    with pytest.raises(SettingsError, match=r"line 2: ACCESS_TOKEN refers to \$\{NOWHERE_SET\}, which is not set"):
        load(file)
    os.environ["NOWHERE_SET"] = "secret"
    assert load(file)["ACCESS_TOKEN"].text == "secret"
    file.write_text("ACCESS_TOKEN=${NEVER_SET:-}\n")
    del os.environ["ACCESS_TOKEN"]
    assert load(file) == {}


CHINESE = "# 端口，不要改\nPORT=7001\n"


@pytest.mark.parametrize(
    "data", [CHINESE.encode(), CHINESE.encode("utf-8-sig"), CHINESE.replace("\n", "\r\n").encode()]
)
def test_utf8_is_read_with_and_without_a_bom(file: Path, data: bytes) -> None:
    file.write_bytes(data)
    assert load(file)["PORT"].text == "7001"


@pytest.mark.parametrize(
    ("data", "encoding"),
    [
        (CHINESE.encode("gbk"), "GB18030"),
        ("PORT=7001\nDEFAULT_INSTRUCTION=给定一个网络搜索查询，检索相关段落\n".encode("gb18030"), "GB18030"),
        (CHINESE.encode("utf-16"), "UTF-16"),
        ("PORT=7001\n".encode("utf-16-le"), "UTF-16LE"),
        ("PORT=7001\n".encode("utf-16-be"), "UTF-16BE"),
        ("# комментарий по-русски\nPORT=7001\n".encode("cp1251"), None),
        ("# Schlüssel für alle\nPORT=7001\n".encode("latin-1"), None),
        (b"PORT=7001\nACCESS_TOKEN=s3cret\xff\n", None),
        (b"PORT=70\x0001\n", None),
    ],
)
def test_another_encoding_is_refused_with_the_way_to_save_it(file: Path, data: bytes, encoding: str | None) -> None:
    file.write_bytes(data)
    with pytest.raises(SettingsError) as caught:
        load(file)
    message = str(caught.value)
    assert message.startswith(f"{file} is not UTF-8 (line {2 if b'ACCESS' in data or b'DEFAULT' in data else 1}")
    assert "save it as UTF-8 in your editor" in message
    assert "s3cret" not in message
    assert "\n" not in message
    assert ("iconv" in message) == bool(encoding)
    if encoding:
        assert f"it looks like {encoding})" in message
        subprocess.run(["bash", "-c", message.partition("or run: ")[2]], check=True)
        assert load(file)["PORT"].text == "7001"


def test_what_is_no_file_is_refused(file: Path) -> None:
    assert load(file) == {}
    file.mkdir()
    with pytest.raises(SettingsError, match="is a folder, as Docker makes"):
        load(file)
    file.rmdir()
    file.symlink_to("nowhere")
    with pytest.raises(SettingsError, match="is a link to a file that does not exist"):
        load(file)


# Names

TYPING_ERRORS = (
    "ACCES_TOKEN ACESS_TOKEN ACCSS_TOKEN ACCESS_TOKENS ACCESS_TOKE ACCESS_TOEKN ACCESS_TOCKEN AXCESS_TOKEN ACCESSTOKEN "
    "ACCESS-TOKEN ACCESS.TOKEN access-token accessToken ACCESS__TOKEN ACCESS_TOKEN_ _ACCESS_TOKEN ACCES_TOKENS "
    "ACCESS_TOKEN_2 ACCESS_TOKEN2 ACCESS_TOKEN_FILE RERANKER_ACCESS_TOKEN reranker_access_token "
    "RERANKER_API_KEY RERANKER_API_KEYS RERANKER_TOKEN reranker_auth_token RERANKER_ACCES_TOKEN RERANKER_ACCESS_TOKENS"
).split()


@pytest.mark.parametrize("name", TYPING_ERRORS)
@pytest.mark.parametrize("place", ["file", "environment"])
def test_a_name_close_to_the_token_s_is_fatal(file: Path, name: str, place: str) -> None:
    if place == "file":
        file.write_text(f"{name}=s3cret\n")
    else:
        os.environ[name] = "s3cret"
    [miss] = near_misses(file)
    assert miss.fatal
    source = str(file) if place == "file" else ENVIRONMENT
    assert str(miss) == f"{name} in {source} is not a setting; did you mean ACCESS_TOKEN?"


@pytest.mark.parametrize(
    "name", ["ACCESS_TOKENS", "ACCESS_TOKEN_2", "ACCESSTOKEN", "ACCES_TOKEN", "RERANKER_ACCES_TOKEN"]
)
@pytest.mark.parametrize("place", ["file", "environment"])
def test_a_name_close_to_the_token_s_only_warns_where_a_token_is_set(file: Path, name: str, place: str) -> None:
    """The service is not open to everybody."""
    os.environ["ACCESS_TOKEN"] = "s3cret"
    if place == "file":
        file.write_text(f"{name}=other\n")
    else:
        os.environ[name] = "other"
    [miss] = near_misses(file)
    assert (miss.name, miss.setting, miss.fatal) == (name, "ACCESS_TOKEN", False)


@pytest.mark.parametrize("name", ["ACCESS_TOKEN_FILE", "RERANKER_ACCESS_TOKEN", "RERANKER_API_KEY", "RERANKER_TOKEN"])
def test_a_name_that_the_token_may_come_from_is_none_of_our_business_once_it_is_set(file: Path, name: str) -> None:
    """As with `ACCESS_TOKEN=${RERANKER_ACCESS_TOKEN}`."""
    os.environ |= {name: "s3cret", "ACCESS_TOKEN": "s3cret"}
    assert near_misses(file) == []


FOREIGN = """
GITHUB_ACCESS_TOKEN HF_ACCESS_TOKEN GH_ACCESS_TOKEN CI_ACCESS_TOKEN X_ACCESS_TOKEN OAUTH_ACCESS_TOKEN AWS_ACCESS_KEY_ID
ACCESS_KEY ACCESS_KEYS ACCESS_KEY_ID ACCESS_CODE ACCESS_LOG ACCESS_TOKEN_URL ACCESS_TOKEN_SECRET ACCESS_TOKEN_TTL
HF_TOKEN REFRESH_TOKEN API_KEY API_TOKEN AUTH_TOKEN TOKEN ACCESS_TOKEN_PORT ACCESS_TOKEN_SERVICE_HOST
ACCESS_TOKEN_PORT_80_TCP
HOSTNAME HOST_IP HOSTS HOSTTYPE HOST_NAME DHOST GHOST PORTS POD_PORT VPORT USER PATH HOME LOGNAME TERM SHELL PWD OLDPWD
SHLVL _ LANG LC_ALL TZ MAIL EDITOR PAGER TMPDIR TMOUT TMUX WORKSPACE GPG_KEY LOGGING LOG_DIR LOG_FILE LOG_PATH MAX_JOBS
KUBERNETES_SERVICE_HOST KUBERNETES_SERVICE_PORT KUBERNETES_SERVICE_PORT_HTTPS KUBERNETES_PORT KUBERNETES_PORT_443_TCP
KUBERNETES_PORT_443_TCP_ADDR RERANKER_PORT RERANKER_SERVICE_HOST RERANKER_SERVICE_PORT_HTTP RERANKER_PORT_6006_TCP_PROTO
RERANKER_SLOT RERANKER_SIBLINGS RERANKER_BOOT RERANKER_SUFFIX RERANKER_METRICS RERANKER_RESPAWNED RERANKER_LISTENERS
WORKERS_PORT WORKERS_SERVICE_HOST TIMEOUT_PORT PROMETHEUS_MULTIPROC_DIR OMP_NUM_THREADS OMP_WAIT_POLICY HUB_MODEL
CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES GUNICORN_CMD_ARGS GUNICORN_FD GUNICORN_TIMEOUT
WEB_CONCURRENCY PYTHONPATH PYTHONUNBUFFERED READ_TIMEOUT TIMEOUT_S MODEL_REGISTRY MODEL_DIR MODELS MODEL_SERVER_WORKERS
HUB_REVISION RAY_ADDRESS MAX_CONNECTIONS BATCH_ID REQUESTS_CA_BUNDLE SSL_CERT_FILE TORCH_INDEX GRAFANA_PASSWORD DEVICE
TORCHINDUCTOR_CACHE_DIR WORKER_ID PRECISION DTYPE INSTRUCTION UVICORN_PORT HTTP_PROXY no_proxy LD_LIBRARY_PATH
HF_ENDPOINT HF_HUB_DISABLE_TELEMETRY PYTORCH_ALLOC_CONF PYTORCH_HIP_ALLOC_CONF
PYTORCH_NO_CUDA_MEMORY_CACHING VLLM_LOGGING_LEVEL LISTEN_FDS
""".split()


def test_names_of_other_programs_in_the_environment_raise_no_alarm(file: Path) -> None:
    os.environ |= dict.fromkeys(FOREIGN, "x")
    assert [str(miss) for miss in near_misses(file)] == []


@pytest.mark.parametrize("name", ["GITHUB_ACCESS_TOKEN", "HF_ACCESS_TOKEN", "ACCESS_TOKEN_URL", "API_KEY", "TOKEN"])
def test_a_name_of_another_program_in_the_file_stops_nothing(file: Path, name: str) -> None:
    file.write_text(f"{name}=x\n")
    assert not any(miss.fatal for miss in near_misses(file))
    file.write_text(f"{name}=x\nACCESS_TOKEN=${{{name}}}\n")
    assert near_misses(file) == []


@pytest.mark.parametrize(
    ("name", "meant", "in_environment"),
    [
        ("MODEL_PRECISON", "MODEL_PRECISION", True),
        ("MODEL_NAME_OR_PAHT", "MODEL_NAME_OR_PATH", True),
        ("MODEL_NAME", "MODEL_NAME_OR_PATH", True),
        ("MODEL_ID", "MODEL_NAME_OR_PATH", True),
        ("MODEL_DTYPE", "MODEL_PRECISION", True),
        ("MAX_BATCH_TOKEN", "MAX_BATCH_TOKENS", True),
        ("MAX_SEQ_LEN", "MAX_SEQ_LENGTH", True),
        ("DEFAULT_INSTRUCTIONS", "DEFAULT_INSTRUCTION", True),
        ("LOGLEVEL", "LOG_LEVEL", True),
        ("KEEPALIVE", "KEEP_ALIVE", True),
        ("REQUEST-TIMEOUT", "REQUEST_TIMEOUT", True),
        ("RERANKER_WORKERS", "WORKERS", True),
        ("RERANKER_WORKER", "WORKERS", True),
        ("RERANKER_MODEL", "MODEL_NAME_OR_PATH", True),
        ("RERANKER_DEVICE", "MODEL_DEVICE", True),
        ("RERANKER_MAX_LENGTH", "MAX_SEQ_LENGTH", True),
        ("REQUEST_TIMEOUT_S", "REQUEST_TIMEOUT", False),
        ("PROT", "", False),
        ("PORTS", "PORT", False),
        ("API_KEY", "ACCESS_TOKEN", False),
        ("DEVICE", "MODEL_DEVICE", False),
        ("EDITOR", "", False),
    ],
)
def test_other_near_misses_warn(file: Path, name: str, meant: str, in_environment: bool) -> None:
    file.write_text(f"{name}=x\n")
    assert [(miss.setting, miss.fatal) for miss in near_misses(file)] == ([(meant, False)] if meant else [])
    load(file)
    assert len(near_misses(file)) == bool(meant), "told once, although it is exported"
    file.unlink()
    os.environ[name] = "x"
    assert [miss.setting for miss in near_misses(file)] == ([meant] if in_environment else [])


def test_what_another_server_calls_a_setting_counts_only_while_ours_is_not_set(file: Path) -> None:
    os.environ |= {"MODEL_NAME": "a", "MODEL_NAME_OR_PATH": "b"}
    assert near_misses(file) == []


def test_a_blank_value_of_a_near_miss_means_nothing(file: Path) -> None:
    os.environ["ACCESS_TOKEN_FILE"] = " "
    file.write_text("ACCES_TOKEN=\n")
    load(file)
    assert near_misses(file) == []


def test_settings_are_no_near_misses_of_each_other(file: Path) -> None:
    os.environ |= dict.fromkeys((*SETTINGS, *LIBRARY_VARIABLES), "1")
    assert near_misses(file) == []
    assert all(closest(name) == name for name in SETTINGS)
    assert closest("EDITOR") is None


# Model names, and texts for messages


@pytest.mark.parametrize(
    ("model", "use"),
    [
        ("https://huggingface.co/Qwen/Qwen3-Reranker-4B", "Qwen/Qwen3-Reranker-4B"),
        ("http://www.huggingface.co/Qwen/Qwen3-Reranker-4B/", "Qwen/Qwen3-Reranker-4B"),
        ("https://huggingface.co/Qwen/Qwen3-Reranker-4B/tree/main", "Qwen/Qwen3-Reranker-4B"),
        ("HTTPS://HuggingFace.co/Qwen/Qwen3-Reranker-4B?library=x#y", "Qwen/Qwen3-Reranker-4B"),
        ("huggingface.co/Qwen/Qwen3-Reranker-4B", "Qwen/Qwen3-Reranker-4B"),
        ("hf.co/Qwen/Qwen3-Reranker-4B", "Qwen/Qwen3-Reranker-4B"),
        ("hf://Qwen/Qwen3-Reranker-4B", "Qwen/Qwen3-Reranker-4B"),
        ("git@hf.co:Qwen/Qwen3-Reranker-4B.git", "Qwen/Qwen3-Reranker-4B"),
        ("https://huggingface.co/Qwen/X/tree/v1.0", "Qwen/X and MODEL_REVISION=v1.0"),
        ("https://huggingface.co/Qwen/X/resolve/abc123/config.json", "Qwen/X and MODEL_REVISION=abc123"),
        ("https://hf-mirror.com/Qwen/X/tree/main", "Qwen/X and HF_ENDPOINT=https://hf-mirror.com"),
        ("https://modelscope.cn/models/Qwen/X", "Qwen/X"),
        ("https://www.modelscope.cn/models/Qwen/X/summary", "Qwen/X"),
        ("modelscope.cn/models/Qwen/X/files", "Qwen/X"),
        ("https://huggingface.co/datasets/a/b", "a name such as Qwen/Qwen3-Reranker-4B"),
        ("https://huggingface.co", "a name such as Qwen/Qwen3-Reranker-4B"),
    ],
)
def test_an_address_is_answered_with_the_name_on_the_hub(model: str, use: str) -> None:
    problem = url_problem(model)
    assert problem is not None
    assert problem.endswith(f"use {use}")


@pytest.mark.parametrize("model", ["s3://bucket/model", "file:///models/x", "https://example.org/x/y", "ftp://h/x"])
def test_another_address_is_refused_too(model: str) -> None:
    assert "or a folder" in str(url_problem(model))


@pytest.mark.parametrize(
    "model",
    [
        "",
        "Qwen/X",
        "./models/X",
        "/models/huggingface.co/Qwen/X",
        "models--Qwen--X",
        "C:\\models\\x",
        "C:/models/x",
        "X",
    ],
)
def test_names_and_folders_are_no_addresses(model: str) -> None:
    assert url_problem(model) is None


def test_a_folder_may_be_called_like_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "huggingface.co/Qwen/X").mkdir(parents=True)
    assert url_problem("huggingface.co/Qwen/X") is None


def test_long_texts_are_shortened() -> None:
    assert shorten("short") == "'short'"
    assert shorten("x" * 5000) == f"'{'x' * 80}'... (5000 characters)"


def test_the_module_needs_neither_torch_nor_pydantic() -> None:
    code = "import sys, reranker.environment; print({'torch', 'pydantic', 'numpy'} & set(sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"


@pytest.mark.parametrize("value", ["7000 ACCESS_TOKEN=s3cret", "7000;ACCESS_TOKEN=s3cret", "7000, HF_TOKEN=s3cret"])
@pytest.mark.parametrize("name", ["PORT", "ACCESS_TOKEN", "MODEL_NAME_OR_PATH"])
def test_two_settings_on_one_line_are_refused_and_show_no_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, value: str
) -> None:
    (tmp_path / ".env").write_text(f"{name}={value}\n")
    monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError) as caught:
        load(tmp_path / ".env")
    assert "s3cret" not in str(caught.value)
    assert f"{name} (set in" in str(caught.value)
    assert "_TOKEN in the same value" in str(caught.value)


@pytest.mark.parametrize("value", ['s3cret"', "s3cret'", 'models/demo"'])
def test_a_quote_that_nothing_opens_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("ACCESS_TOKEN", value)
    with pytest.raises(SettingsError, match=r"ACCESS_TOKEN .* ends with a quote that none opens"):
        load(tmp_path / "none")
    monkeypatch.delenv("ACCESS_TOKEN")
    monkeypatch.setenv("DEFAULT_INSTRUCTION", "Find the dogs'")
    assert load(tmp_path / "none")["DEFAULT_INSTRUCTION"].text == "Find the dogs'"


@pytest.mark.parametrize("value", ["hf-mirror.com", "//hf-mirror.com", "https://"])
def test_a_mirror_without_a_scheme_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: str) -> None:
    monkeypatch.setenv("HF_ENDPOINT", value)
    with pytest.raises(SettingsError, match="write it like https://"):
        load(tmp_path / "none")


@pytest.mark.parametrize("name", ["DEFAULT_INSTRUCTION", "MODEL_NAME_OR_PATH", "ACCESS_TOKEN"])
def test_a_value_that_is_not_utf_8_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv(name, "压缩".encode("gb18030").decode("utf-8", "surrogateescape"))
    with pytest.raises(SettingsError, match=f"{name} in the environment is not UTF-8"):
        load(tmp_path / "none")
    monkeypatch.setenv(name, "压缩")
    assert load(tmp_path / "none")[name].text == "压缩"
