"""The settings of the service: name, default, bounds and one line of description each.

Values come from the environment, then from `.env` in the working directory. `reranker/settings.py` declares the
settings of the model. docs/settings.md, its Chinese version and .env.example list all of them; tests compare.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import string
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, ValidationInfo
from pydantic_settings import BaseSettings, SettingsConfigDict

from reranker import environment
from reranker.environment import SettingsError, shorten
from reranker.http import callers, client_address
from reranker.settings import AutoInt, ModelSettings, problems

__all__ = ["OWN_WORKER_CLASS", "Settings", "SettingsError", "load_settings", "log_config", "misspelt"]

WORKER_CLASSES = ("uvicorn.workers.UvicornWorker", "uvicorn_worker.UvicornWorker")
OWN_WORKER_CLASS = "reranker.server.worker.RerankWorker"
MAX_TOKEN_LENGTH = 16_384  # characters: half of the limit on the head of a request


def _check_host(value: str) -> str:
    value = value.strip()
    host = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    if ":" in host or re.search(r"[\s/]", host):
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ValueError(
                "write an address or a name alone, such as 0.0.0.0, 127.0.0.1 or ::1; the port is PORT"
            ) from None
    return host


def _check_worker_class(value: str) -> str:
    if value not in (*WORKER_CLASSES, OWN_WORKER_CLASS):
        raise ValueError(
            f"use {' or '.join(WORKER_CLASSES)}: both mean this service's own worker; gthread, sync and gevent cannot "
            f"run an ASGI application, and gunicorn's asgi worker serves before the model is loaded"
        )
    return value


def _check_log_format(value: str) -> str:
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


def _check_tokens(value: str) -> str:
    if re.match(r"\$(\w+$|[({])", value):
        raise ValueError(
            "only a shell replaces $...; write the token itself, such as the output of: openssl rand -hex 32"
        )
    tokens = [token.strip() for token in value.split(",")]
    if any(len(token) > MAX_TOKEN_LENGTH for token in tokens):
        raise ValueError(f"a token has at most {MAX_TOKEN_LENGTH} characters: no request could carry it")
    if any(set(token) - set(string.printable) or re.search(r"\s", token) for token in tokens):
        rule = "; in name=token the name is a-z, then at most 31 of a-z, 0-9, - and _" if "=" in value else ""
        raise ValueError(f"tokens are printable ASCII without spaces, several separated by commas{rule}")
    if value.strip() and not any(tokens):  # the operator wants a token, and an empty list would open the service
        raise ValueError("there is no token between the commas; leave it empty to serve without a token")
    callers.entries(value)  # for its errors
    return ",".join(filter(None, tokens))


_ALLOCATOR_OPTIONS = (
    *("backend", "expandable_segments", "garbage_collection_threshold", "graph_capture_record_stream_reuse"),
    *("large_segment_size_mb", "max_non_split_rounding_mb", "max_split_size_mb", "per_process_memory_fraction"),
    *("pinned_max_cached_size_mb", "pinned_max_round_threshold_mb", "pinned_num_register_threads"),
    *("pinned_reserve_segment_size_mb", "pinned_use_background_threads", "pinned_use_cuda_host_register"),
    *("release_lock_on_cudamalloc", "roundup_power2_divisions", "throw_on_cudamalloc_oom"),
)
"""Options of PyTorch 2.13. Other versions may add some, so only misspellings of these are refused."""
_ALLOCATOR = re.compile(r"(\w+):(\[[\w.:>,\s]+\]|[\w.]+)")


def _check_allocator(value: str) -> str:
    value = re.sub(r"\s*([,:])\s*", r"\1", value)
    options = _ALLOCATOR.findall(value)
    if value and ",".join(f"{name}:{text}" for name, text in options) != value:
        raise ValueError("write option:value, several separated by commas, such as expandable_segments:True")
    for name, text in options:
        closest = get_close_matches(name.lower(), _ALLOCATOR_OPTIONS, 1, 0.8)
        if closest and closest[0] != name:
            raise ValueError(f"{name} is not an option of PyTorch's allocator; did you mean {closest[0]}?")
        if name == "expandable_segments" and text not in ("True", "False"):
            raise ValueError("expandable_segments takes True or False")
    return value


_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])(:(\d{1,5}))?")
_DEFAULT_PORT = re.compile(r"(?<=^http:)(.+):80$|(?<=^https:)(.+):443$")  # browsers omit it


def _normalize_origins(value: str) -> str:
    origins = [origin.strip().lower() for origin in value.split(",")]
    if value.strip() and not any(origins):
        raise ValueError("there is no origin between the commas; leave it empty to allow none")
    if "*" in origins and any(origin not in ("*", "") for origin in origins):
        raise ValueError("* allows every origin, so it stands alone")
    for i, origin in enumerate(origins):
        match = _ORIGIN.fullmatch(origin)
        if origin not in ("*", "") and (match is None or int(match[4] or 0) > 65535):
            raise ValueError(
                "an origin is scheme://host or scheme://host:port in ASCII without a path, a slash at its end or "
                "a wildcard, as in https://app.example,http://localhost:3000; * alone allows every origin"
            )
        if match and match[4]:  # browsers write a port without leading zeros
            origins[i] = f"{origin.removesuffix(match[3])}:{int(match[4])}"
    return ",".join(_DEFAULT_PORT.sub(r"\1\2", origin) for origin in origins if origin)


def _check_proxies(value: str, info: ValidationInfo) -> str:
    try:
        proxies = client_address.networks(value)
    except ValueError as error:
        raise ValueError(f"{error}; write addresses or networks, such as 10.0.0.0/8, separated by commas") from None
    if not proxies and info.data.get("access_log_client") == "forwarded":
        raise ValueError(
            "ACCESS_LOG_CLIENT=forwarded needs the proxies' addresses, because any client can send X-Forwarded-For"
        )
    return ",".join(map(str, proxies))


class Settings(ModelSettings, BaseSettings):
    """All settings. Field names are the lower-case names of the environment variables."""

    model_config = SettingsConfigDict(extra="ignore", case_sensitive=False, frozen=True)
    _sources: dict[str, str] = PrivateAttr(default_factory=dict)

    def source(self, name: str) -> str:
        """Return the source of a setting's value: the environment, a line of `.env`, or the default."""
        return self._sources.get(name, "the default")

    # Listening
    host: Annotated[str, AfterValidator(_check_host)] = Field(
        "0.0.0.0", max_length=255, description="Address to listen on"
    )
    port: int = Field(6006, ge=0, le=65535, description="Port to listen on; 0: any free port")
    workers: AutoInt = Field(
        1, ge=1, le=256, description="Worker processes, each with its own model; auto: one per GPU"
    )
    worker_class: Annotated[str, AfterValidator(_check_worker_class)] = Field(
        WORKER_CLASSES[0], description="uvicorn.workers.UvicornWorker or uvicorn_worker.UvicornWorker"
    )
    worker_connections: int = Field(
        1000, ge=1, le=100_000, description="Max requests in flight per worker; the rest get 429"
    )
    timeout: int = Field(120, ge=1, le=3600, description="Seconds without a heartbeat until gunicorn replaces a worker")
    keep_alive: int = Field(5, ge=1, le=3600, description="Seconds that an idle connection stays open")
    load_timeout: int = Field(1800, ge=1, le=86_400, description="Max seconds to download and load the model")

    # Access and limits
    access_token: Annotated[str, AfterValidator(_check_tokens)] = Field(
        "", repr=False, description="Token or name=token, or several separated by commas; empty: no token is required"
    )
    cors_allow_origins: Annotated[str, AfterValidator(_normalize_origins)] = Field(
        "", description="Origins of web pages that may call it, separated by commas, or * for all; empty: none"
    )
    max_documents: int = Field(2048, ge=1, le=100_000, description="Max documents in one request")
    max_body_bytes: int = Field(16_777_216, ge=1024, le=1_073_741_824, description="Max bytes of a request body")
    max_queue_tokens: int = Field(
        1_000_000, ge=1, le=1_000_000_000, description="Max tokens in the queue; further requests get 429"
    )
    score_cache_entries: int = Field(
        0, ge=0, le=10_000_000, description="Scores that each worker caches, up to 600 bytes each; 0: no cache"
    )
    request_timeout: float = Field(
        100, gt=0, le=3600, description="Max seconds from the end of the body to the response, else 504"
    )
    body_timeout: float = Field(
        20, gt=0, le=3600, description="Max seconds to receive the head, and again the body, else 408"
    )

    # Libraries and logs
    tokenizers_parallelism: Annotated[Literal["true", "false"], BeforeValidator(str.lower)] = Field(
        "false", description="true or false; passed on to the tokenizers library"
    )
    pytorch_cuda_alloc_conf: Annotated[str, AfterValidator(_check_allocator)] = Field(
        "", max_length=4096, description="Passed on to PyTorch, e.g. expandable_segments:True"
    )
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(str.upper)] = Field(
        "INFO", description="DEBUG, INFO, WARNING, ERROR, CRITICAL"
    )
    log_format: Annotated[str, AfterValidator(_check_log_format)] = Field(
        "%(asctime)s - %(name)s - %(levelname)s - %(message)s",
        max_length=4096,
        description="json, or a %-style format of Python's logging",
    )
    access_log_client: Annotated[Literal["none", "peer", "forwarded"], BeforeValidator(str.lower)] = Field(
        "none",
        description="Client's address in the access log: none, peer, or forwarded (as TRUSTED_PROXIES report it)",
    )
    trusted_proxies: Annotated[str, AfterValidator(_check_proxies)] = Field(
        "",
        max_length=4096,
        validate_default=True,
        description="Addresses and networks of proxies whose X-Forwarded-For is read, separated by commas",
    )


environment.register(Settings.model_fields)


def load_settings(env_file: str | Path = ".env") -> Settings:
    """Read the environment and `.env`, and export the variables that libraries read themselves.

    Every name in `.env` that is not set yet is exported, so that HF_ENDPOINT or HF_HOME work from there too.

    Raises:
        SettingsError: `.env` cannot be read, values cannot be used, or names are close to an unset ACCESS_TOKEN.
    """
    lines: dict[str, str] = {}
    values = environment.load(env_file, lines)
    for miss in [] if lines else environment.near_misses(env_file):
        if miss.fatal:
            lines[miss.name] = f"{miss} The service would accept requests without a token; correct or remove it"
    texts: dict[str, Any] = {name.lower(): value.text for name, value in values.items()}
    try:
        settings = Settings(**texts)
    except ValidationError as error:
        for field, reason in problems(error, Settings.model_fields).items():
            name = field.upper()
            given = values.get(name, environment.Value("", "the default"))
            value = "(hidden)" if field == "access_token" else shorten(given.text)
            lines.setdefault(name, f"{name}={value} cannot be used; {reason} (set in {given.source})")
    if lines:
        raise SettingsError("\n".join(lines.values()))
    settings._sources.update((name.lower(), value.source) for name, value in values.items())
    os.environ["TOKENIZERS_PARALLELISM"] = settings.tokenizers_parallelism
    if settings.log_format == "json":  # a download's progress bar is not JSON
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if settings.pytorch_cuda_alloc_conf:
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = settings.pytorch_cuda_alloc_conf
    return settings


def misspelt(env_file: str | Path = ".env") -> list[str]:
    """Return a warning for each name in `.env` or the environment that is close to a setting's name."""
    return [str(miss) for miss in environment.near_misses(env_file)]


def log_config(settings: Settings) -> dict[str, Any]:
    """Return a `logging.config.dictConfig` for the whole process: one handler and one format."""
    json = settings.log_format == "json"
    text = {"()": "reranker.server.logs.TextFormatter", "fmt": settings.log_format}
    formatter = {"()": "reranker.server.logs.JsonFormatter"} if json else text
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"default": formatter},
        "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "default"}},
        "root": {"level": settings.log_level, "handlers": ["stderr"]},
        "loggers": {
            "gunicorn.error": {"level": settings.log_level, "handlers": [], "propagate": True},
            # http/access.py writes the access line; theirs would contain the token of the query string.
            "gunicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
            "uvicorn": {"level": settings.log_level, "handlers": [], "propagate": True},
            "uvicorn.access": {"level": "CRITICAL", "handlers": [], "propagate": False},
            # Their DEBUG lines contain whole requests.
            "httpcore": {"level": "INFO"},
            "httpx": {"level": "WARNING"},
            "asyncio": {"level": "INFO"},
        },
    }
