"""The two forms of a log line: text with a time that names its zone, and LOG_FORMAT=json, one object per line."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any


class TextFormatter(logging.Formatter):
    """Python's %-style format; `asctime` is the local time in ISO 8601, with milliseconds and the offset to UTC."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the time of a record."""
        return datetime.fromtimestamp(record.created).astimezone().isoformat(" ", "milliseconds")


class JsonFormatter(logging.Formatter):
    """Time in UTC, level, logger, process id and message, and the facts of an access line as separate fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, in ASCII, which is valid in any encoding of stderr."""
        facts: dict[str, Any] | None = getattr(record, "facts", None)
        fields: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname,
            "logger": record.name,
            "pid": record.process,
            "message": record.getMessage() if facts is None else "request",
            **(facts or {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = record.stack_info
        return json.dumps(fields, default=str)
