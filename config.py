"""Every setting of the service, once: name, default, bounds and one line of what it does.

Values come from the environment, then from `.env` in the working directory. README.md, README.zh-CN.md and
.env.example list the same settings; tests/test_config.py holds them together.
"""

from __future__ import annotations

import logging
import os
import re
import string
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

WORKER_CLASSES = ("uvicorn.workers.UvicornWorker", "uvicorn_worker.UvicornWorker")
OWN_WORKER_CLASS = "reranker.service.worker.RerankWorker"


class SettingsError(Exception):
    """A setting cannot be used; the message is one line that names it, its value and what is allowed."""


def _worker_class(value: str) -> str:
    if value not in (*WORKER_CLASSES, OWN_WORKER_CLASS):
        raise ValueError(
            f"use {' or '.join(WORKER_CLASSES)}: both mean this service's own worker; gthread, sync and gevent cannot "
            f"run an ASGI application, and gunicorn's asgi worker serves before the model is loaded"
        )
    return value


def _log_format(value: str) -> str:
    if value.strip().lower() == "json":
        return "json"
    try:
        logging.PercentStyle(value).validate()
        logging.Formatter(value).format(logging.makeLogRecord({}))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"neither json nor a %-style log format ({error}); example: %(asctime)s %(levelname)s %(message)s"
        ) from error
    return value


def _token(value: str) -> str:
    tokens = [token.strip() for token in value.split(",")]
    if any(set(token) - set(string.printable) or re.search(r"\s", token) for token in tokens):
        raise ValueError("tokens are printable ASCII without spaces, several separated by commas")
    if value.strip() and not any(tokens):  # it was meant to close the service, and would open it
        raise ValueError("there is no token between the commas; leave it empty to let everybody in")
    return ",".join(filter(None, tokens))


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:(\d{1,5}))?")
_DEFAULT_PORT = re.compile(r"(?<=^http:)(.+):80$|(?<=^https:)(.+):443$")  # browsers leave it out


def _origins(value: str) -> str:
    origins = [origin.strip().lower() for origin in value.split(",")]
    if value.strip() and not any(origins):
        raise ValueError("there is no origin between the commas; leave it empty to allow none")
    if "*" in origins and any(origin not in ("*", "") for origin in origins):
        raise ValueError("* allows every origin, so it stands alone")
    for origin in filter(None, origins):
        found = _ORIGIN.fullmatch(origin)
        if origin != "*" and (found is None or int(found[4] or 0) > 65535):
            raise ValueError(
                "an origin is scheme://host or scheme://host:port in ASCII without a path, a slash at its end or "
                "a wildcard, as in https://app.example,http://localhost:3000; * alone allows every origin"
            )
    return ",".join(_DEFAULT_PORT.sub(r"\1\2", origin) for origin in origins if origin)


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def _upper(value: Any) -> Any:
    return value.upper() if isinstance(value, str) else value


def _auto(value: Any) -> Any:
    """`auto` and blank mean None."""
    return None if isinstance(value, str) and value.lower() in ("auto", "") else value


Precision = Literal["auto", "bfloat16", "float16", "float32", "int8", "float8", "bf16", "fp16", "fp32", "fp8"]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]
AutoInt = Annotated[int | None, BeforeValidator(_auto)]


class Settings(BaseSettings):
    """All settings. Field names are the lower-case names of the environment variables."""

    model_config = SettingsConfigDict(extra="ignore", case_sensitive=False, frozen=True)

    # Where it listens
    host: str = Field("0.0.0.0", description="Address to listen on")
    port: int = Field(6006, ge=0, le=65535, description="Port to listen on; 0 takes a free one")
    workers: AutoInt = Field(
        1, ge=1, le=256, description="Worker processes, each with its own model; auto: one per GPU"
    )
    worker_class: Annotated[str, AfterValidator(_worker_class)] = Field(
        WORKER_CLASSES[0], description="uvicorn.workers.UvicornWorker or uvicorn_worker.UvicornWorker"
    )
    worker_connections: int = Field(1000, ge=1, le=100_000, description="Requests in progress per worker; more get 429")
    timeout: int = Field(120, ge=1, le=3600, description="Seconds without a heartbeat until gunicorn replaces a worker")
    keep_alive: int = Field(5, ge=1, le=3600, description="Seconds that an idle connection stays open")

    # What it serves
    model_name_or_path: str = Field("", description="Hub name or folder; empty: the bundled demo model")
    model_revision: str = Field("", description="Branch, tag or commit on the hub; empty: the newest")
    model_device: Annotated[str, BeforeValidator(_lower), Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = Field(
        "auto", description="auto, cuda, cuda:N or cpu"
    )
    model_precision: Annotated[Precision, BeforeValidator(_lower)] = Field(
        "auto", description="auto, bfloat16, float16, float32, int8, float8 (bf16, fp16, fp32, fp8)"
    )
    max_memory_percentage: float = Field(
        90, ge=1, le=100, description="Most of the device's memory that a worker takes"
    )
    batch_size: AutoInt = Field(
        None, ge=1, le=65536, description="Most documents in one forward pass; auto: no such limit"
    )
    max_batch_tokens: AutoInt = Field(
        None, ge=256, le=4_194_304, description="Tokens in one forward pass; auto: measured at start"
    )
    max_seq_length: int = Field(8192, ge=128, le=131_072, description="Tokens of prompt and document; the rest is cut")
    default_instruction: str = Field("", max_length=4096, description="Default instruction; empty: Qwen's own")
    load_timeout: int = Field(1800, ge=1, le=86_400, description="Seconds that download and load may take")

    # What it accepts
    access_token: Annotated[str, AfterValidator(_token)] = Field(
        "", repr=False, description="Token, or several separated by commas; empty: open to everybody"
    )
    cors_allow_origins: Annotated[str, AfterValidator(_origins)] = Field(
        "", description="Origins of web pages that may call it, separated by commas, or * for all; empty: none"
    )
    max_documents: int = Field(2048, ge=1, le=100_000, description="Documents in one request")
    max_body_bytes: int = Field(16_777_216, ge=1024, le=1_073_741_824, description="Bytes of a request's body")
    max_queue_tokens: int = Field(1_000_000, ge=1, le=1_000_000_000, description="Tokens that wait; more get 429")
    score_cache_entries: int = Field(
        0,
        ge=0,
        le=10_000_000,
        description="Documents whose scores each worker remembers for itself, in up to 600 bytes each; 0: none",
    )
    request_timeout: float = Field(
        100, gt=0, le=3600, description="Seconds from the end of its body until a request is answered with 504"
    )
    body_timeout: float = Field(
        20, gt=0, le=3600, description="Seconds for a head, and again for its body, to arrive, else 408"
    )

    # How it runs and logs
    tokenizers_parallelism: Literal["true", "false"] = Field("false", description="Passed on to the tokenizers library")
    pytorch_cuda_alloc_conf: str = Field("", description="Passed on to PyTorch, e.g. expandable_segments:True")
    log_level: Annotated[LogLevel, BeforeValidator(_upper)] = Field("INFO", description="DEBUG, INFO, WARNING, ERROR")
    log_format: Annotated[str, AfterValidator(_log_format)] = Field(
        "%(asctime)s - %(name)s - %(levelname)s - %(message)s",
        description="json, or a %-style format of Python's logging",
    )


_FREE_TEXT = ("access_token", "default_instruction", "log_format")


def load_settings(env_file: str | Path = ".env") -> Settings:
    """Read environment and `.env`, and put the variables that libraries read themselves into the environment.

    Everything in `.env` is exported where it is not set yet, so that HF_ENDPOINT or HF_HOME work from there too.

    Raises:
        SettingsError: a value is misspelt or out of range.
    """
    for name, value in dotenv_values(env_file).items():
        if value is not None:
            os.environ.setdefault(name, value)
    for name in map(str.upper, Settings.model_fields):
        value = os.environ.get(name, "")
        if value and name.lower() not in _FREE_TEXT:  # docker --env-file hands "cuda  # a comment" on as it stands
            value = os.environ[name] = re.sub(r"\s+#.*$", "", value).strip()
        if not value.strip():  # blank means unset, as in `ACCESS_TOKEN=` of a copied .env.example
            os.environ.pop(name, None)
    try:
        settings = Settings()
    except ValidationError as error:
        raise SettingsError(_one_line(error)) from None
    os.environ["TOKENIZERS_PARALLELISM"] = settings.tokenizers_parallelism
    if settings.log_format == "json":  # a download's progress bar is not JSON
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if settings.pytorch_cuda_alloc_conf:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = settings.pytorch_cuda_alloc_conf
    return settings


def misspelt(env_file: str | Path = ".env") -> list[str]:
    """A line for each name in `.env` that is no setting but looks like one; strangers are nobody's business."""
    known = [name.upper() for name in Settings.model_fields]
    close = {name: get_close_matches(name.upper(), known, 1, 0.85) for name in dotenv_values(env_file)}
    return [
        f"{name} in {env_file} is not a setting; did you mean {match[0]}?"
        for name, match in close.items()
        if match and name.upper() not in known
    ]


def _one_line(error: ValidationError) -> str:
    """The first problem: which variable, its value, what is allowed."""
    problem = error.errors(include_url=False)[0]
    name = str(problem["loc"][0]) if problem["loc"] else "?"
    value = "(hidden)" if name == "access_token" else repr(problem.get("input"))
    message = problem["msg"].removeprefix("Value error, ")
    field = Settings.model_fields.get(name)
    if field is not None and problem["type"] != "value_error":
        message = f"allowed: {_allowed(field)}"
    return f"{name.upper()}={value} cannot be used; {message}"


def _allowed(field: FieldInfo) -> str:
    """The range of a number, or the description, which lists the choices."""
    bounds = {key: getattr(m, key) for m in field.metadata for key in ("gt", "ge", "le") if hasattr(m, key)}
    if not bounds:
        return str(field.description)
    low = f"{bounds['ge']}" if "ge" in bounds else f"above {bounds['gt']}"
    whole = "a number" if field.annotation is float else "a whole number"
    return f"{whole}, {low} to {bounds['le']}{' or auto' if 'auto' in str(field.description) else ''}"


def log_config(settings: Settings) -> dict[str, Any]:
    """A `logging.config.dictConfig` for the whole process: one handler and one format for all."""
    json = settings.log_format == "json"
    formatter = {"()": "reranker.service.logs.JsonFormatter"} if json else {"format": settings.log_format}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"default": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "default"}},
        "root": {"level": settings.log_level, "handlers": ["stderr"]},
        "loggers": {
            "gunicorn.error": {"level": settings.log_level, "handlers": [], "propagate": True},
            # Our own access line replaces theirs, which would hold the query token.
            "gunicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
            "uvicorn": {"level": settings.log_level, "handlers": [], "propagate": True},
            "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
            # Their DEBUG lines hold whole requests.
            "httpcore": {"level": "INFO"},
            "httpx": {"level": "WARNING"},
            "asyncio": {"level": "INFO"},
        },
    }
