"""Read settings from the environment and `.env` by the same rules in the service, the command line and Ray.

python-dotenv parses a value: it removes one pair of quotes around the whole value, and an unquoted value ends before
white space and `#`. `docker run --env-file` passes quotes and comments on, so values of the environment go through the
same parser. `${NAME}` is replaced in `.env` only.
"""

from __future__ import annotations

import io
import os
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dotenv.parser import Binding, parse_stream
from dotenv.variables import Variable, parse_variables

SETTINGS = ["ACCESS_TOKEN"]  # `register` adds the others; the command line reads the token as well

LIBRARY_VARIABLES = (
    *("HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM"),
    *("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"),
)
"""Variables that libraries read themselves and that belong in `.env` as well."""

ENVIRONMENT = "the environment"
_TOKEN = "ACCESS_TOKEN"
_QUOTES = ("'", '"')
_UNCLOSED = "it opens with a quote that does not close it: put one pair of quotes around the whole value, or none"
_TYPOGRAPHIC = re.compile(r"\s*[“”„‘’«「][^“”„‘’«»「」]*[“”‘’»」]\s*(\s#.*)?")
_STRAIGHT = "it is in typographic quotes, which are text: write ' or \", or no quotes"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_ASSIGNMENT = re.compile(r"\s*(?:export\s+)?([\w.-]+)\s*(=?)\s*(['\"]?)")
_NEXT = re.compile(r"\s*(?:export\s+)?([A-Z][A-Z0-9_]*)\s*=(.?)")
_MAX_SHOWN = 80
_NEVER_BLANK = ("HF_", "PYTORCH_")  # not exported without a value: the hub's client would take it as a URL
_FREE_TEXT = ("DEFAULT_INSTRUCTION", "LOG_FORMAT")
_SECOND = re.compile(r"[\s;,]([A-Z][A-Z0-9_]*_[A-Z0-9_]*)=")


def register(names: Iterable[str]) -> None:
    """Add the names of settings, in any case: all names that `load` and `near_misses` know."""
    SETTINGS.extend(name.upper() for name in names if name.upper() not in SETTINGS)


class SettingsError(Exception):
    """Settings cannot be used; the message has a line for each, with its name, its value and the allowed ones."""

    @property
    def report(self) -> str:
        """The message for standard error."""
        return "\n".join(f"error: {line}" for line in str(self).split("\n"))


@dataclass(frozen=True, slots=True)
class Value:
    """The text of a setting, without quotes and comment, and its source."""

    text: str
    source: str


def shorten(text: str) -> str:
    """Return `repr(text)` for an error message, with at most 80 characters of the text."""
    return repr(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!r}... ({len(text)} characters)"


def clean(raw: str) -> str:
    """Return a value of the environment without the quotes around it or the comment after it.

    Raises:
        ValueError: a quote opens the value and does not close it.
    """
    raw = raw.lstrip("\r\n").rstrip()
    if re.search(r"[\r\n]", raw) and not raw.lstrip().startswith(_QUOTES):
        return raw.lstrip()  # impossible in a file, so there is no comment to remove
    if _TYPOGRAPHIC.fullmatch(raw):
        raise ValueError(_STRAIGHT)
    bindings = list(parse_stream(io.StringIO(f"X={raw}", newline="")))
    if len(bindings) != 1 or bindings[0].error or bindings[0].value is None:
        raise ValueError(_UNCLOSED)
    return bindings[0].value


def quote(text: str) -> str:
    """Return `text` so that `clean` reads it back: unquoted wherever possible.

    Worker processes and Ray's replicas read exported values again and must not remove a second pair of quotes.
    """
    try:
        if clean(text) == text:
            return text
    except ValueError:
        pass
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def get(name: str) -> str:
    """Return a variable of the environment without quotes and comment; empty where it is not set.

    Raises:
        SettingsError: a quote opens the value and does not close it, or its bytes are not UTF-8.
    """
    raw = os.environ.get(name, "")
    if not raw.isascii() and any("\udc80" <= character <= "\udcff" for character in raw):
        raise SettingsError(f"{name} in {ENVIRONMENT} is not UTF-8: set it in a terminal or a file that is UTF-8")
    try:
        return clean(raw).strip()
    except ValueError as error:
        raise SettingsError(f"{name} in {ENVIRONMENT} cannot be used; {error}") from None


def load(env_file: str | Path = ".env", problems: dict[str, str] | None = None) -> dict[str, Value]:
    """Return the non-blank settings by name, and export them and all other names of `.env`.

    The environment wins over `.env`; a blank value counts as not set; names may be in lower case.

    Args:
        env_file: its path.
        problems: receives the error of each value that cannot be read, by name, and the value counts as not set.

    Raises:
        SettingsError: `.env` cannot be read, or a value cannot and `problems` is None.
    """
    file = read_env_file(env_file)
    values: dict[str, Value] = {}
    unreadable: dict[str, str] = {} if problems is None else problems
    for name in SETTINGS:
        for other in [other for other in os.environ if other != name and other.upper() == name]:
            os.environ.setdefault(name, os.environ.pop(other))
        try:
            value = _read(name, file.get(name))
        except SettingsError as error:
            unreadable[name] = str(error)
            continue
        if value.text:
            values[name] = value
            os.environ[name] = quote(value.text)
        else:
            os.environ.pop(name, None)
    _export_others(file)
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and not re.match(r"https?://[^/]", endpoint):
        unreadable["HF_ENDPOINT"] = f"HF_ENDPOINT={shorten(endpoint)} is not a URL: write it like https://hf-mirror.com"
    if problems is None and unreadable:
        raise SettingsError("\n".join(unreadable.values()))
    return values


def _read(name: str, line: Value | None) -> Value:
    """Return the value of the environment, else that of a line of `.env`; raise SettingsError."""
    value = Value(get(name), ENVIRONMENT)
    if line and value.text in ("", line.text.strip()):  # the parent process exported the same text
        value = Value(line.text.strip(), line.source)
    _check_value(name, value.text, value.source)
    return value


def _check_value(name: str, text: str, source: str) -> None:
    """Raise SettingsError for a value with a second setting, or with a closing quote that none opens."""
    if name in _FREE_TEXT:
        return
    if second := _SECOND.search(text):
        raise SettingsError(
            f"{name} (set in {source}) is followed by {second[1]} in the same value: write one setting per line"
        )
    if text.endswith(_QUOTES) and text.count(text[-1]) == 1:
        raise SettingsError(f"{name} (set in {source}) ends with a quote that none opens: remove it")


def _export_others(file: dict[str, Value]) -> None:
    for name in set(LIBRARY_VARIABLES) - set(SETTINGS):
        if name in os.environ and not (name in file and file[name].text == os.environ[name]):
            os.environ[name] = get(name)
        if not os.environ.get(name) and name.startswith(_NEVER_BLANK):
            os.environ.pop(name, None)
    for name, value in file.items():
        if name not in SETTINGS and (value.text or not name.startswith(_NEVER_BLANK)):
            os.environ.setdefault(name, value.text)


# The file


def read_env_file(path: str | Path = ".env") -> dict[str, Value]:
    """Return the values of a file, the names of settings in upper case; an empty dictionary without a file.

    Raises:
        SettingsError: it cannot be read, is not UTF-8, or has a line that is not NAME=value.
    """
    text = _decode(path)
    values: dict[str, Value] = {}
    for binding in parse_stream(io.StringIO(text)):
        blank = len(binding.original.string) - len(binding.original.string.lstrip())
        where = f"{path} line {binding.original.line + binding.original.string[:blank].count(chr(10))}"
        _check_line(binding, where)
        if binding.key is None or binding.value is None:
            continue
        upper = binding.key.upper()
        name = upper if upper in SETTINGS else binding.key
        value = Value(_replace_variables(name, binding.value, values, where), where)
        first = values.get(name)
        if name in SETTINGS and first and first.text.strip() and first.text != value.text:
            raise SettingsError(f"{where} sets {name} again and differently ({first.source} set it): keep one of them")
        values[name] = value
    return values


_UNREADABLE: dict[type[OSError], str] = {
    FileNotFoundError: "is a link to a file that does not exist: remove it, or mount its target",
    IsADirectoryError: "is a folder, as Docker makes for a mount without a source: remove it and write a file",
}


def _decode(path: str | Path) -> str:
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not os.path.islink(path):
            return ""
        problem = _UNREADABLE.get(type(error), f"cannot be read: {error.strerror}")
        raise SettingsError(f"{path} {problem}") from None
    try:
        text = io.TextIOWrapper(io.BytesIO(data), encoding="utf-8-sig").read()  # translates line ends as open() does
    except UnicodeDecodeError as error:
        raise SettingsError(_not_utf8(path, data, error.start)) from None
    if "\0" in text:
        raise SettingsError(_not_utf8(path, data, data.index(b"\0")))
    return text


def _not_utf8(path: str | Path, data: bytes, position: int) -> str:
    encoding = _guess_encoding(data)
    line = 1 + data[:position].count(b"\n")
    if not encoding:
        return f"{path} is not UTF-8 (line {line}): save it as UTF-8 in your editor"
    old, new = shlex.quote(str(path)), shlex.quote(f"{path}.new")
    return (
        f"{path} is not UTF-8 (line {line}; it looks like {encoding}): save it as UTF-8 in your editor, or run: "
        f"iconv -f {encoding} -t UTF-8 {old} > {new} && mv {new} {old}"
    )


def _guess_encoding(data: bytes) -> str:
    """Return the probable encoding of non-UTF-8 bytes: `UTF-16`, `UTF-16LE`, `UTF-16BE`, `GB18030` or an empty text."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "UTF-16"
    if b"\0" in data:
        odd, even = data[1::2].count(0), data[::2].count(0)
        return "UTF-16LE" if odd > len(data) // 4 else "UTF-16BE" if even > len(data) // 4 else ""
    try:
        text = data.decode("gb18030")
    except UnicodeDecodeError:
        return ""
    foreign = [char for char in text if not char.isascii()]
    # Lead bytes of Chinese punctuation and the 3,755 common characters; bytes of Cyrillic code pages are mostly above.
    common = [char for char in foreign if 0xA1 <= char.encode("gb18030")[0] <= 0xD7]
    return "GB18030" if len(common) > 0.7 * len(foreign) else ""


def _check_line(binding: Binding, where: str) -> None:
    """Raise SettingsError for a line that python-dotenv ignores, without its text: it may contain a token."""
    line = binding.original.string
    match = _ASSIGNMENT.match(line)
    name = (closest(match[1]) if match else None) or "NAME"
    if binding.error and match and match[2] and match[3]:
        raise SettingsError(f"{where} cannot be read: {name} has a value that {_UNCLOSED.removeprefix('it ')}")
    if binding.error:
        raise SettingsError(f"{where} cannot be read: write {name}=value")
    if binding.key is None:
        return
    if binding.value is None:
        raise SettingsError(f"{where} cannot be read: there is no '='; write {name}=value")
    if not _NAME.fullmatch(binding.key):
        raise SettingsError(f"{where} cannot be read: a name has letters, digits and _ only; write {name}=value")
    if binding.key.upper() in SETTINGS and _TYPOGRAPHIC.fullmatch(line.partition("=")[2].rstrip("\r\n")):
        raise SettingsError(f"{where}: {name} cannot be used; {_STRAIGHT}")
    later = filter(None, map(_NEXT.match, line.strip().splitlines()[1:]))
    if any(match[1] in SETTINGS or match[2] not in ("", "=") for match in later):  # not the padding of a PEM file
        raise SettingsError(f"{where} cannot be read: its value extends over the next NAME=value; close its quote")


def _replace_variables(name: str, text: str, values: dict[str, Value], where: str) -> str:
    """Replace `${NAME}` as python-dotenv does; a setting must not refer to an unset name."""
    known = dict(os.environ) | {other: value.text for other, value in values.items()}
    atoms = list(parse_variables(text))
    for atom in atoms:
        if name in SETTINGS and isinstance(atom, Variable) and atom.default is None and not known.get(atom.name):
            raise SettingsError(
                f"{where}: {name} refers to ${{{atom.name}}}, which is not set; set it, or write the value itself"
            )
    return "".join(atom.resolve(known) for atom in atoms)


# Names


@dataclass(frozen=True, slots=True)
class NearMiss:
    """A name that is not read but is probably meant as a setting."""

    name: str
    setting: str
    source: str
    fatal: bool
    """Whether the service must not start: it would require no token although the operator set one."""

    def __str__(self) -> str:
        return f"{self.name} in {self.source} is not a setting; did you mean {self.setting}?"


_SIMILAR = 0.85
# Names that other servers use for these settings. Each counts only while our own is not set.
_MEANT = {
    "ACCESS_TOKEN_FILE": _TOKEN,
    **dict.fromkeys(("API_KEY", "API_KEYS", "API_TOKEN", "AUTH_TOKEN", "BEARER_TOKEN", "TOKEN"), _TOKEN),
    **dict.fromkeys(("MODEL", "MODEL_ID", "MODEL_NAME", "MODEL_PATH"), "MODEL_NAME_OR_PATH"),
    "DEVICE": "MODEL_DEVICE",
    **dict.fromkeys(("DTYPE", "MODEL_DTYPE", "PRECISION"), "MODEL_PRECISION"),
    **dict.fromkeys(("MAX_LENGTH", "MAX_MODEL_LEN"), "MAX_SEQ_LENGTH"),
    "INSTRUCTION": "DEFAULT_INSTRUCTION",
}
_PREFIX = "RERANKER_"
_PLAIN_PREFIXES = ("MODEL", "ACCESS_TOKEN", _PREFIX)
_SHORT = ("HOST", "PORT")  # too many names of other programs differ from them by one letter
_SERVICE_LINK = re.compile(r"_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)", re.I)


def _bare(name: str) -> str:
    return re.sub(r"[^A-Z0-9]", "", name.upper())


def closest(name: str) -> str | None:
    """Return the setting that a name is, or is a misspelling of."""
    settings = {_bare(setting): setting for setting in SETTINGS}
    match = get_close_matches(_bare(name), settings, 1, _SIMILAR)
    return settings[match[0]] if match else None


def near_misses(env_file: str | Path = ".env") -> list[NearMiss]:
    """Return the names with a value, in `.env` and the environment, that are not settings but close to one.

    The environment contains names of many other programs, so stricter rules apply to it.

    Raises:
        SettingsError: `.env` cannot be read.
    """
    file = read_env_file(env_file)
    unset = {name for name in SETTINGS if not get(name) and not (name in file and file[name].text.strip())}
    names = {name: str(env_file) for name, value in file.items() if value.text.strip()}
    names |= {name: ENVIRONMENT for name, text in os.environ.items() if text.strip() and name not in file}
    return [miss for name, source in names.items() if (miss := _near_miss(name, source, unset))]


def _near_miss(name: str, source: str, unset: set[str]) -> NearMiss | None:
    upper, foreign = name.upper(), source == ENVIRONMENT
    if upper in SETTINGS or upper in LIBRARY_VARIABLES or (foreign and _SERVICE_LINK.search(name)):
        return None
    bare = upper.removeprefix(_PREFIX)
    meant = bare if bare in SETTINGS else _MEANT.get(bare)
    if meant in unset and (not foreign or upper.startswith(_PLAIN_PREFIXES)):
        return NearMiss(name, meant, source, meant == _TOKEN and upper.startswith(("ACCESS", _PREFIX)))
    setting = None if bare in SETTINGS else closest(bare)
    if setting is None or (foreign and (setting in _SHORT or _has_words_of(bare, setting))):
        return None
    if setting == _TOKEN and _has_words_of(bare, setting):  # such as HF_ACCESS_TOKEN
        return NearMiss(name, setting, source, fatal=False) if setting in unset else None
    return NearMiss(name, setting, source, setting == _TOKEN and setting in unset)


def _has_words_of(name: str, setting: str) -> bool:
    """Whether a name is a setting's with other words around it; numbers do not count as words."""
    extra = f"_{re.sub(r'[^A-Z0-9]+', '_', name)}_".partition(f"_{setting}_")
    return bool(extra[1]) and bool(re.search(r"[A-Z]", extra[0] + extra[2]))
