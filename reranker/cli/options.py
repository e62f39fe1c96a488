"""The options that every command shares: which model, or which running service, scores.

A model option that is not given takes the value of the service's setting of the same name, from the environment and
then from `.env` in the working directory, so that one `.env` serves both.
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from reranker import environment
from reranker.environment import SettingsError, shorten, url_problem
from reranker.errors import InputError

T = TypeVar("T")


class NotAllowedError(ValueError):
    """A text is no value of an option; the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class Option:
    """A model option: the setting behind it, how a text becomes its value, and what is allowed."""

    setting: str
    read: Callable[[str], Any]
    allowed: str
    default: Any = None

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def name(self) -> str:
        """Its name as a keyword of `Scorer.load`."""
        short = {"model_name_or_path": "model", "default_instruction": "instruction"}
        name = self.setting.lower()
        return short.get(name, name.removeprefix("model_"))

    def value(self, text: str, source: str) -> Any:
        """`text` as the option's value.

        Raises:
            InputError: it cannot be used; names `source`.
        """
        try:
            return self.read(text)
        except ValueError as error:
            reason = error if isinstance(error, NotAllowedError) else self.allowed
            raise InputError(f"{source}={shorten(text)} cannot be used; {reason}") from None


def _one_of(pattern: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if not re.fullmatch(pattern, text.lower()):
            raise ValueError
        return text.lower()

    return read


def _between(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not least <= int(text) <= most:
            raise ValueError
        return int(text)

    return read


def _at_most(length: int) -> Callable[[str], str]:
    def read(text: str) -> str:
        if len(text) > length:
            raise NotAllowedError(f"at most {length} characters")
        return text

    return read


def _model(text: str) -> str:
    if problem := url_problem(text):
        raise NotAllowedError(problem)
    return _at_most(4096)(text)


def _or_auto(read: Callable[[str], T]) -> Callable[[str], T | None]:
    return lambda text: None if text.lower() == "auto" else read(text)


def _percentage(text: str) -> float:
    if not 1 <= float(text) <= 100:
        raise ValueError
    return float(text)


OPTIONS = (
    Option("MODEL_NAME_OR_PATH", _model, "a hub name or a folder; without it: the bundled demo model"),
    Option("MODEL_REVISION", _at_most(255), "branch, tag or commit on the hub"),
    Option("MODEL_DEVICE", _one_of(r"auto|cpu|cuda(:\d{1,3})?"), "auto, cpu, cuda or cuda:N", "auto"),
    Option(
        "MODEL_PRECISION",
        _one_of("auto|bfloat16|float16|float32|int8|float8|bf16|fp16|fp32|fp8"),
        "auto, bfloat16, float16, float32, int8 or float8 (bf16, fp16, fp32, fp8)",
        "auto",
    ),
    Option("MAX_MEMORY_PERCENTAGE", _percentage, "most of the device's memory, 1 to 100", 90.0),
    Option(
        "MAX_SEQ_LENGTH",
        _between(128, 131_072),
        "tokens of prompt and document, 128 to 131072; the rest is truncated",
        8192,
    ),
    Option("BATCH_SIZE", _or_auto(_between(1, 65_536)), "max documents in one forward pass, 1 to 65536, or auto"),
    Option("MAX_BATCH_TOKENS", _or_auto(_between(256, 4_194_304)), "tokens in one pass, 256 to 4194304, or auto"),
)
_DEFAULT_INSTRUCTION = Option("DEFAULT_INSTRUCTION", _at_most(4096), "an instruction")


def load_env_file(path: str | Path = ".env") -> list[str]:
    """Put `.env` into the environment where a name is not set yet, for the libraries too (HF_ENDPOINT, HF_HOME).

    Returns:
        A line for each name, in `.env` or the environment, that is no setting but looks like one.

    Raises:
        InputError: `.env` or a value of the environment cannot be read.
    """
    try:
        environment.load(path)
        return [str(miss) for miss in environment.near_misses(path)]
    except SettingsError as error:
        raise InputError(str(error)) from None


def _environment_value(name: str) -> str:
    try:
        return environment.get(name)
    except SettingsError as error:
        raise InputError(str(error)) from None


def _setting(option: Option) -> Any:
    """Return the value of an option that was not given: from the environment, else the default. Blank means unset."""
    text = _environment_value(option.setting)
    return option.value(text, option.setting) if text else option.default


def add_model_options(parser: argparse.ArgumentParser, *, service: bool = True) -> None:
    """Which model or (unless there is no choice) which service scores."""
    group = parser.add_argument_group("model", "defaults come from the environment and .env, as for the service")
    for option in OPTIONS:
        group.add_argument(option.flag, metavar="VALUE", help=f"{option.allowed} ({option.setting})")
    group.add_argument("--instruction", metavar="TEXT", help="what relevant means here (DEFAULT_INSTRUCTION)")
    if service:
        group = parser.add_argument_group("service", "a running service instead of a model in this process")
        group.add_argument("--url", help="its address, such as http://127.0.0.1:6006")
        group.add_argument("--token", help="its token; safer in the environment: the first of ACCESS_TOKEN")
    else:
        parser.set_defaults(url=None, token=None)
    parser.add_argument("--verbose", action="store_true", help="say what was chosen and why")


@dataclass(frozen=True, slots=True)
class Source:
    """Where scores come from: a service when `url` is set, else `Scorer.load(**model)`."""

    url: str | None
    token: str | None
    model: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """What changes scores; an interrupted batch is only continued with the same."""
        if self.url:
            return {"url": self.url}
        name = self.model["model"]
        path = os.path.abspath(os.path.expanduser(name)) if name else None
        model = path if path and os.path.isdir(path) else name
        kept = ("revision", "precision", "max_seq_length", "instruction")
        return {"model": model} | {key: self.model[key] for key in kept}


def source(args: argparse.Namespace) -> Source:
    """The options as given, completed from the environment.

    Raises:
        InputError: a value cannot be used, or model options were given together with --url.
    """
    given = {o: getattr(args, o.name) for o in OPTIONS if getattr(args, o.name) is not None}
    if args.url is not None:
        if given:
            raise InputError(f"{next(iter(given)).flag} has no effect with --url: the service has chosen; leave it out")
        if not re.match(r"https?://[^/]", args.url):
            raise InputError(f"--url={args.url!r} is no address; write it like http://127.0.0.1:6006")
        tokens = (token.strip() for token in _environment_value("ACCESS_TOKEN").split(","))
        return Source(args.url.rstrip("/"), args.token or next(filter(None, tokens), None), {})
    if args.token is not None:
        raise InputError("--token is for a running service; give its address with --url")
    model = {o.name: o.value(given[o], o.flag) if o in given else _setting(o) for o in OPTIONS}
    return Source(None, None, model | {"instruction": _setting(_DEFAULT_INSTRUCTION)})
