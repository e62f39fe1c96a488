"""The settings of the model, declared once for the service, the command line and Ray.

`config.Settings` adds the settings of the service; `reranker/cli/options.py` generates the model options from these.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from reranker import environment
from reranker.environment import SettingsError, shorten

_HUBS = {  # host -> the setting that selects it
    "huggingface.co": "",
    "hf.co": "",
    "hf-mirror.com": "HF_ENDPOINT=https://hf-mirror.com",
    "modelscope.cn": "",
    "modelscope.ai": "",
}
_URL = re.compile(r"(?:(?P<scheme>[a-z][a-z0-9+.-]*)://|git@)?(?P<host>[^/:]*)[/:]?(?P<path>[^?#]*)", re.I)
_EXAMPLE = "Qwen/Qwen3-Reranker-4B"
_KEYWORDS = {"model_name_or_path": "name", "default_instruction": "instruction"}


def url_problem(model: str) -> str | None:
    """Return the correction of a model name that is a URL, or None for a hub name or a folder."""
    match = _URL.match(model.replace("hf://", "https://huggingface.co/", 1))
    host = match["host"].lower().removeprefix("www.") if match else ""
    if match is None or not (match["scheme"] or (host in _HUBS and not os.path.exists(model))):
        return None
    if host not in _HUBS:
        return f"it is a URL; write the name of a model on the hub, such as {_EXAMPLE}, or a folder"
    parts = [part for part in match["path"].split("/") if part]
    parts = parts[parts[:1] == ["models"] :]
    if len(parts) < 2 or parts[0] in ("datasets", "spaces", "collections", "papers"):
        return f"it is a URL, but not that of a model; use a name such as {_EXAMPLE}"
    hints = [f"{parts[0]}/{parts[1].removesuffix('.git')}"]
    if parts[2:3] in (["tree"], ["blob"], ["resolve"]) and parts[3:4] not in ([], ["main"]):
        hints.append(f"MODEL_REVISION={parts[3]}")
    return "it is a URL; use " + " and ".join([*hints, *filter(None, [_HUBS[host]])])


def _check_model_name(value: str) -> str:
    if problem := url_problem(value):
        raise ValueError(problem)
    return value


def _auto_is_none(value: Any) -> Any:
    return None if str(value).lower() == "auto" else value


Precision = Literal[
    "auto", "bfloat16", "float16", "float32", "int8", "float8", "bf16", "fp16", "fp32", "fp8", "float32-w16"
]
AutoInt = Annotated[int | None, BeforeValidator(_auto_is_none)]


class ModelSettings(BaseModel):
    """Settings of the model. Field names are the lower-case names of the environment variables."""

    model_config = ConfigDict(frozen=True)

    model_name_or_path: Annotated[str, AfterValidator(_check_model_name)] = Field(
        "", max_length=4096, description="Hub name or folder; empty: the bundled demo model"
    )
    model_revision: str = Field("", max_length=255, description="Branch, tag or commit on the hub; empty: the newest")
    model_device: Annotated[str, BeforeValidator(str.lower), Field(pattern=r"^(auto|cpu|cuda(:\d{1,3})?)$")] = Field(
        "auto", description="auto, cpu, cuda or cuda:N"
    )
    model_precision: Annotated[Precision, BeforeValidator(str.lower)] = Field(
        "auto", description="auto, bfloat16, float16, float32, float32-w16, int8 or float8 (bf16, fp16, fp32, fp8)"
    )
    max_memory_percentage: float = Field(
        90, ge=1, le=100, description="Max share of the device's memory that a process takes"
    )
    max_seq_length: int = Field(
        8192, ge=128, le=131_072, description="Max tokens of prompt and document; the rest is truncated"
    )
    batch_size: AutoInt = Field(
        None, ge=1, le=65_536, description="Max documents in one forward pass; auto: no such limit"
    )
    max_batch_tokens: AutoInt = Field(
        None, ge=256, le=4_194_304, description="Max tokens in one forward pass; auto: measured at start"
    )
    default_instruction: str = Field(
        "", max_length=4096, description="Default instruction; empty: the checkpoint's own"
    )

    def load_options(self) -> dict[str, Any]:
        """Return the keywords of `Scorer.load`; empty ones are absent, so that its defaults apply."""
        values = {keyword(field): getattr(self, field) for field in ModelSettings.model_fields}
        return {name: value for name, value in values.items() if value not in ("", None)}

    def resolved(self) -> ModelSettings:
        """Return the same settings with the absolute path of a local folder."""
        path = os.path.abspath(os.path.expanduser(self.model_name_or_path))
        local = bool(self.model_name_or_path) and os.path.isdir(path)
        return self.model_copy(update={"model_name_or_path": path}) if local else self


def keyword(field: str) -> str:
    """Return the keyword of `Scorer.load` that a field of `ModelSettings` becomes."""
    return _KEYWORDS.get(field, field.removeprefix("model_"))


def read(texts: Mapping[str, tuple[str, str]]) -> ModelSettings:
    """Return the settings of texts: field -> its name in an error text, and its value. The others have defaults.

    Raises:
        SettingsError: values cannot be used.
    """
    values: dict[str, Any] = {field: text for field, (_, text) in texts.items()}
    try:
        return ModelSettings(**values)
    except ValidationError as error:
        reasons = problems(error, ModelSettings.model_fields).items()
        lines = [f"{texts[field][0]}={shorten(texts[field][1])} cannot be used; {reason}" for field, reason in reasons]
        raise SettingsError("\n".join(lines)) from None


def problems(error: ValidationError, fields: Mapping[str, FieldInfo]) -> dict[str, str]:
    """Return each field that cannot be used, with the reason: its validator's text or the allowed values."""
    found: dict[str, str] = {}
    for problem in error.errors(include_url=False):
        name = str(problem["loc"][0]) if problem["loc"] else "?"
        own = name not in fields or problem["type"] == "value_error"
        reason = problem["msg"].removeprefix("Value error, ") if own else f"allowed: {allowed(fields[name])}"
        found.setdefault(name, reason)
    return found


def allowed(field: FieldInfo) -> str:
    """Return the choices, the range of a number, the max length of a text, or the description."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(get_args(field.annotation))
    keys = ("gt", "ge", "le", "max_length")
    limits = {key: getattr(m, key) for m in field.metadata for key in keys if hasattr(m, key)}
    if "max_length" in limits:
        return f"at most {limits['max_length']} characters"
    if not limits:
        return str(field.description)
    low = f"{limits['ge']}" if "ge" in limits else f"above {limits['gt']}"
    kind = "a number" if field.annotation is float else "a whole number"
    return f"{kind}, {low} to {limits['le']}{' or auto' if 'auto' in str(field.description) else ''}"


environment.register(ModelSettings.model_fields)
