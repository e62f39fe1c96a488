"""The encoding of a text file: by `--encoding`, its byte order mark, else UTF-8; never a guess."""

from __future__ import annotations

import codecs
import re

from reranker.errors import InputError

_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
_MIN_EVIDENCE = 10
"""Non-ASCII characters that are hardly ever valid UTF-8 in another encoding."""


def encoding_name(text: str) -> str:
    """Return Python's name of an encoding, GB18030 for its subsets.

    Raises:
        InputError: there is no such encoding, or its line ends are not those of ASCII or UTF-16.
    """
    try:
        name = codecs.lookup(text).name
        known = is_wide(name) or b"\n".decode(name, errors="replace") == "\n"
    except (LookupError, ValueError):
        known = False
    if not known:
        raise InputError(f"--encoding={text!r} is not known; such as utf-8, gb18030, utf-16 or big5")
    return {"gbk": "gb18030", "gb2312": "gb18030", "utf-8-sig": "utf-8"}.get(name, name)


def is_wide(encoding: str) -> bool:
    """Whether an encoding has line ends of several bytes."""
    return encoding.startswith(("utf-16", "utf-32"))


def encoding_of(head: bytes, given: str | None, name: str) -> str:
    """Return the encoding of a text by its first bytes.

    Raises:
        InputError: they contradict the given one, or are not text.
    """
    if head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise InputError(f"{name} is UTF-32; save it as UTF-8")
    marked = next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)
    if given and marked and not given.startswith(marked):
        raise InputError(f"{name} begins with the byte order mark of {marked.upper()}; leave --encoding {given} out")
    encoding = given or marked or "utf-8"
    if b"\0" in head and not is_wide(encoding):
        raise InputError(f"{name} holds NUL bytes: it is no text, or UTF-16 (--encoding utf-16-le)")
    if given and given != "utf-8" and not marked and _is_utf8(head, given):
        raise InputError(f"{name} is UTF-8; leave --encoding {given} out")
    return encoding


def _is_utf8(head: bytes, given: str) -> bool:
    """Whether bytes are UTF-8 beyond doubt, and not in the given encoding."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    if is_wide(given):  # its line ends and blanks have NUL bytes
        return bool(text) and not re.search(r"[^\t\r\n -\U0010ffff]", text)
    return sum(not c.isascii() for c in text) >= _MIN_EVIDENCE


def advice(raw: bytes, assumed: str) -> str:
    """Return how to read a line that is not in the assumed encoding."""
    plain = assumed == "utf-8"
    try:
        raw.decode("gb18030" if plain else "utf-8")
    except UnicodeDecodeError:
        return "save it as UTF-8, or name its encoding with --encoding" if plain else "name another with --encoding"
    return "if the file is GBK: --encoding gb18030" if plain else "it is UTF-8; leave --encoding out"
