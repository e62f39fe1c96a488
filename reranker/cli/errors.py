"""How a command ends when it cannot go on: one line on standard error and an exit code, never a traceback."""

from __future__ import annotations

from typing import ClassVar


class CommandError(Exception):
    """Base of both; the message says what was wrong and how to mend it."""

    code: ClassVar[int] = 1


class InputError(CommandError):
    """What the user gave cannot be used: arguments, environment, a file or a line of it."""

    code = 2


class FailedError(CommandError):
    """The input is fine, but the work could not be done: no model, no service, no disk space."""
