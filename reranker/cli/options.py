"""The options that select a model or a running service, which all commands share.

A model option that is not given has the value of the setting of the same name, from the environment and then from
`.env` in the working directory, so that one `.env` serves the service and the command line.
"""

from __future__ import annotations

import argparse
import re

from reranker import environment
from reranker.environment import SettingsError
from reranker.errors import InputError
from reranker.rankers.source import Source
from reranker.settings import ModelSettings, allowed, keyword, read

INSTRUCTION = "default_instruction"
"""The field without an option of its own: `--instruction` is sent with each request, to a service too."""


def option(field: str) -> str:
    """Return the option of a field of `ModelSettings`."""
    return "--" + keyword(field).replace("_", "-") if keyword(field) != "name" else "--model"


def add_model_options(parser: argparse.ArgumentParser, *, service: bool = True, several: bool = False) -> None:
    """Add the options of the model, and of a service if `service` is set.

    With `several`, --model, --instruction and --url may be repeated, and their values are lists.
    """
    again, more = ("append", "; may be repeated") if several else ("store", "")
    group = parser.add_argument_group("model", "defaults come from the environment and .env, as for the service")
    for name, field in ModelSettings.model_fields.items():
        if name != INSTRUCTION:
            limits = f"; {allowed(field)}" if isinstance(field.default, int | float | None) else ""
            text = f"{field.description}{limits} ({name.upper()})"
            repeated = name == "model_name_or_path"
            action, text = (again, text + more) if repeated else ("store", text)
            group.add_argument(option(name), dest=name, metavar="VALUE", help=text, action=action)
    text = f"definition of relevance ({INSTRUCTION.upper()}){more}"
    group.add_argument("--instruction", metavar="TEXT", help=text, action=again)
    if service:
        group = parser.add_argument_group("service", "a running service instead of a model in this process")
        text = f"its address, such as http://127.0.0.1:6006{more}"
        group.add_argument("--url", help=text, action=again)
        group.add_argument("--token", help="its token; safer in the environment: the first of ACCESS_TOKEN")
    else:
        parser.set_defaults(url=None, token=None)
    parser.add_argument("--verbose", action="store_true", help="print the automatic choices and their reasons")


def load_env_file() -> list[str]:
    """Export the names of `.env` that are not set yet, for the libraries too (HF_ENDPOINT, HF_HOME).

    Returns:
        A warning for each name, in `.env` or the environment, that is close to a setting's name.

    Raises:
        InputError: `.env` or a value of the environment cannot be read.
    """
    try:
        environment.load()
        return [str(miss) for miss in environment.near_misses()]
    except SettingsError as error:
        raise InputError(*str(error).split("\n")) from None


def source(args: argparse.Namespace) -> Source:
    """Return the model or service of the options, completed from the environment.

    Raises:
        InputError: a value cannot be used, or model options were given together with --url.
    """
    fields = ModelSettings.model_fields
    given = {name: (option(name), text) for name in fields if (text := getattr(args, name, None)) is not None}
    try:
        if args.url is not None:
            return _service(args, next(iter(given), None))
        if args.token is not None:
            raise InputError("--token is for a running service; give its address with --url")
        if getattr(args, "concurrency", None) is not None:
            raise InputError("--concurrency is for a running service; give its address with --url")
        variables = {name: (name.upper(), text) for name in fields if (text := environment.get(name.upper()))}
        return Source(model=read(variables | given))
    except SettingsError as error:
        raise InputError(*str(error).split("\n")) from None


def _service(args: argparse.Namespace, field: str | None) -> Source:
    if field:
        raise InputError(f"{option(field)} has no effect with --url: the service has its own model; leave it out")
    if not re.match(r"https?://[^/]", args.url):
        raise InputError(f"--url={args.url!r} is not a URL; write it like http://127.0.0.1:6006")
    connections: int | None = getattr(args, "concurrency", None)  # only `batch` and `evaluate` have it
    tokens = (token.strip() for token in environment.get("ACCESS_TOKEN").split(","))
    return Source(args.url.rstrip("/"), args.token or next(filter(None, tokens), None), connections=connections)
