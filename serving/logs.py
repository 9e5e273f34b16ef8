"""How the server's log looks, for people or for machines, and what it says of calls.

A line of JSON has `time` (RFC 3339, UTC), `level`, `logger` and `message`, then what is known of `request_id`,
`method`, `code`, `milliseconds`, `model`, `version` and `trace_id`, and `exception` for a bug. Images are never logged.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any, Literal


def start(style: Literal["human", "json"], level: str) -> None:
    """Log to stderr from now on: from this server what is at least `level`, from libraries what is at least info."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else HumanFormatter())
    least = logging.getLevelNamesMapping()[level.upper()]
    # Debug lines are for our own modules: Pillow's quote the files that it reads.
    logging.basicConfig(level=max(least, logging.INFO), handlers=[handler])
    for package in ("serving", "export"):
        logging.getLogger(package).setLevel(least)


def log_fields(log: logging.Logger, level: int, message: str, error: Exception | None = None, **fields: Any) -> None:
    """Log a message with what is known beside it; fields that are empty are left out."""
    known = {name: value for name, value in fields.items() if value not in ("", None)}
    log.log(level, "%s", message, exc_info=error, extra={"fields": known})


class HumanFormatter(logging.Formatter):
    """A line to read, with its fields at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line, without the traceback that may follow."""
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in _fields(record).items())


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback is a text in it."""
        content = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False, default=str)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    return getattr(record, "fields", {})


class Tally:
    """Logs what strangers can cause at will: the first time at once, then as a sum, at most once in a while."""

    def __init__(self, log: logging.Logger, message: str, seconds: float = 60) -> None:
        """Count nothing yet.

        Args:
            log: Where to.
            message: Has a place for the number of times and one for who was last.
            seconds: From one line to the next, at least.
        """
        self._log, self._message, self._seconds = log, message, seconds
        self._lock = threading.Lock()
        self._count = 0
        self._next = 0.0

    def add(self, who: str) -> None:
        """Count it once more."""
        with self._lock:
            self._count += 1
            now = time.monotonic()
            if now < self._next:
                return
            count, self._count, self._next = self._count, 0, now + self._seconds
        self._log.warning(self._message, count, who)
