"""A server in a process of its own, for the length of a `with` block."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Self

from resnet import BadInput


class ServerProcess:
    """Starts a command that prints `serving on HOST:PORT`, and ends it with SIGTERM."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start the command, without waiting; `address` waits until it serves."""
        self._command = command
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self._errors: list[str] = []
        # Read all the time: a server whose pipe is full stops.
        self._reader = threading.Thread(target=self._errors.extend, args=(self._process.stderr,), daemon=True)
        self._reader.start()

    @cached_property
    def address(self) -> str:
        """HOST:PORT, once the server listens there.

        Raises:
            BadInput: The process ended instead; the message has its error output.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if match := re.fullmatch(r"serving on (\S+)\n", line):
                return match[1]
        self._process.wait()
        self._reader.join()
        raise BadInput(f"the server did not start: {''.join(self._errors).strip() or ' '.join(self._command)}")

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdout is not None
        self._process.terminate()
        self._process.wait()
        self._reader.join()
        self._process.stdout.close()


def serve(repository: Path, *options: str) -> ServerProcess:
    """Start `resnet serve` on a free port, with all that the repository holds."""
    command = [sys.executable, "-m", "resnet"]
    return ServerProcess([*command, "serve", str(repository), "--port=0", "--strict", *options])
