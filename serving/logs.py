"""Log of the server, as text lines for people or as JSON for machines.

A JSON line has `time` (RFC 3339, UTC), `level`, `logger` and `message`; about a call also `request_id`, `method`,
`code`, `milliseconds`, `model`, `version` and `trace_id`, as far as they are known; and `exception` for a bug. Images
are never logged.
"""

from __future__ import annotations

import io
import json
import logging
import os
import select
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

Style = Literal["human", "json"]

announcements = logging.getLogger("announcements")


def start(style: Style, level: str) -> None:
    """Log to stderr from `level` on, without the debug messages of libraries, and announce on stdout.

    With the style `json` all that Python code prints becomes JSON too.
    """
    minimum = logging.getLevelNamesMapping()[level.upper()]
    # Pillow's debug messages quote the files that it reads.
    logging.basicConfig(
        level=max(minimum, logging.INFO), handlers=_make_handlers(sys.__stderr__, style, HumanFormatter())
    )
    for package in ("serving", "export"):
        logging.getLogger(package).setLevel(minimum)
    announcements.handlers = _make_handlers(sys.__stdout__, style, logging.Formatter())
    announcements.setLevel(logging.INFO)
    announcements.propagate = False
    if style == "json":
        sys.stdout, sys.stderr = _LoggedStream("stdout", logging.INFO), _LoggedStream("stderr", logging.ERROR)
        threading.excepthook = _log_exception


def announce(message: str) -> None:
    """Print a line that users wait for, such as the server's address, whatever the log level is."""
    announcements.info("%s", message)


def _make_handlers(stream: TextIO | None, style: Style, formatter: logging.Formatter) -> list[logging.Handler]:
    if stream is None:  # closed when the process started; another file may have its number by now
        return [logging.NullHandler()]
    if style == "json":
        return [LineHandler(stream.fileno(), JsonFormatter(), "utf-8")]
    return [LineHandler(stream.fileno(), formatter, stream.encoding)]


def _log_exception(hook: threading.ExceptHookArgs) -> None:
    if hook.exc_value is not None:
        name = hook.thread.name if hook.thread else "unknown"
        logging.getLogger(__name__).error("the thread %s ended by an error", name, exc_info=hook.exc_value)


class LineHandler(logging.Handler):
    """Writes each record at once; a line that cannot be written at once is dropped.

    A closed or stopped terminal, a full pipe or disk holds up no request that way, nor the end of the process: no text
    is left in a buffer.
    """

    def __init__(self, descriptor: int, formatter: logging.Formatter, encoding: str) -> None:
        """Write to a file descriptor; characters that `encoding` lacks are escaped."""
        super().__init__()
        self.setFormatter(formatter)
        self._descriptor, self._encoding = descriptor, encoding
        self._writable = select.poll()
        self._writable.register(descriptor, select.POLLOUT)

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        try:
            rest = f"{self.format(record)}\n".encode(self._encoding, "backslashreplace")
        except Exception:
            self.handleError(record)
            return
        with suppress(OSError):
            while rest and self._writable.poll(0):  # a pipe that is writable has room for so many bytes
                rest = rest[os.write(self._descriptor, rest[: select.PIPE_BUF]) :]


class _LoggedStream(io.TextIOBase):
    """Stands for stdout or stderr, and logs each line."""

    def __init__(self, name: str, level: int) -> None:
        self._log, self._level, self._rest = logging.getLogger(name), level, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in filter(None, lines):
            self._log.log(self._level, "%s", line)
        return len(text)


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


class LineBudget:
    """Limits how many lines clients can cause: some at once, later ones at a low rate."""

    def __init__(self, burst: int = 20, per_second: float = 2) -> None:
        """Begin with `burst` lines, which are also the most to save up."""
        self._burst, self._rate = burst, per_second
        self._lock = threading.Lock()
        self._left, self._at = float(burst), time.monotonic()

    def take(self) -> bool:
        """Return whether a line may be written, which then counts."""
        with self._lock:
            now = time.monotonic()
            self._left, self._at = min(self._burst, self._left + (now - self._at) * self._rate), now
            if self._left < 1:
                return False
            self._left -= 1
            return True
