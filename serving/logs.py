"""Log of the server, as text lines for people or as JSON for machines.

A JSON line has `time` (RFC 3339, UTC), `level`, `logger` and `message`; about a call also `request_id`, `method`,
`code`, `milliseconds`, `model`, `version` and `trace_id`, as far as they are known; and `exception` for a bug. Images
are never logged.
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
    """Log to stderr from `level` on, without the debug messages of libraries."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else HumanFormatter())
    minimum = logging.getLevelNamesMapping()[level.upper()]
    # Pillow's debug messages quote the files that it reads.
    logging.basicConfig(level=max(minimum, logging.INFO), handlers=[handler])
    for package in ("serving", "export"):
        logging.getLogger(package).setLevel(minimum)


def log_fields(log: logging.Logger, level: int, message: str, error: Exception | None = None, **fields: Any) -> None:
    """Log a message with fields; empty ones are left out."""
    present = {name: value for name, value in fields.items() if value not in ("", None)}
    log.log(level, "%s", message, exc_info=error, extra={"fields": present})


class HumanFormatter(logging.Formatter):
    """Formats a record as a text line with its fields at the end."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line without a traceback, which `format` appends."""
        return super().formatMessage(record) + "".join(f" {name}={value}" for name, value in _fields(record).items())


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; a traceback is one of its strings."""
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


class RateLimitedLog:
    """Limits how often clients can cause a log line: the first event is logged at once, later ones are summed up."""

    def __init__(self, log: logging.Logger, message: str, seconds: float = 60) -> None:
        """Start at zero.

        Args:
            log: Logger of the lines.
            message: Format with two placeholders: the number of events and the detail of the last one.
            seconds: Minimum interval between two lines.
        """
        self._log, self._message, self._seconds = log, message, seconds
        self._lock = threading.Lock()
        self._count = 0
        self._next = 0.0

    def add(self, detail: str) -> None:
        """Count an event, and log the count if the interval is over."""
        with self._lock:
            self._count += 1
            now = time.monotonic()
            if now < self._next:
                return
            count, self._count, self._next = self._count, 0, now + self._seconds
        self._log.warning(self._message, count, detail)
