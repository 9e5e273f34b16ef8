"""What a process of the service knows of the supervisor that started it: its task, orders, and a way to report.

All of it goes over standard input, which is a socket, in lines of JSON. That the supervisor is gone shows there too, so
no process outlives it. Signals are for the supervisor alone, whoever sends them to all processes.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import msgspec

from resnet import BadInput, CheckFailed
from serving import logs
from serving.config import Config

DRAIN, SCAN = "drain", "scan"


class Task(msgspec.Struct, frozen=True):
    """What a process is to do.

    Attributes:
        config: Of the service; the port is that which all front ends share.
        door: Descriptor of the socket through which front ends ask to be let in: their end, or the engine's.
        again: Whether this process replaces one that died.
    """

    config: Config
    door: int
    again: bool = False


class Report(msgspec.Struct, frozen=True):
    """Says that a process is ready, or with an exit code that is not 0 why it ends, in a sentence for the user."""

    code: int = 0
    reason: str = ""


def encode(message: Task | Report) -> bytes:
    """Return a message as a line."""
    return msgspec.json.encode(message, enc_hook=str) + b"\n"  # the hook is for paths


def decode_task(line: bytes) -> Task:
    """Return the task that a line holds."""
    return msgspec.json.decode(line, type=Task, dec_hook=_to_path)


def _to_path(kind: type, value: Any) -> Any:
    if kind is not Path:
        raise NotImplementedError(kind)
    return Path(value)


class Child:
    """This process, as one that a supervisor has started."""

    def __init__(self) -> None:
        """Take the task, and from then on orders."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        self._supervisor = socket.socket(fileno=sys.stdin.fileno())
        self._lines = self._supervisor.makefile("rb")
        self._orders: SimpleQueue[str] = SimpleQueue()
        self.task = decode_task(self._lines.readline())
        self.door = socket.socket(fileno=self.task.door)
        threading.Thread(target=self._listen, name="orders", daemon=True).start()

    def report(self, code: int = 0, reason: str = "") -> None:
        """Say that the process is ready, or why it ends."""
        self._supervisor.sendall(encode(Report(code, reason)))

    def wait(self, seconds: float | None = None) -> str | None:
        """Return the next order, `DRAIN` or `SCAN`, or None if there is none within `seconds`."""
        try:
            return self._orders.get(timeout=seconds)
        except Empty:
            return None

    def _listen(self) -> None:
        for line in self._lines:
            self._orders.put(line.decode().strip())
        os._exit(1)  # the supervisor is gone, and whoever would wait for what is under way


def run(work: Callable[[Child], None]) -> None:
    """Do the work of a process, and report what keeps it from it."""
    child = Child()
    logs.start(child.task.config.log_format, child.task.config.log_level)
    code, reason = 0, ""
    try:
        work(child)
    except (BadInput, OSError) as error:
        code, reason = 2, str(error)
    except CheckFailed as error:
        code, reason = 1, str(error)
    except ModuleNotFoundError as error:
        code, reason = 2, f"{error.name} is not installed; install resnet with its extra 'serving'"
    if code:
        child.report(code, reason)
    sys.exit(code)
