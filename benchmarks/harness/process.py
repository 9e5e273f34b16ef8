"""A server in a process of its own, for the length of a `with` block."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Self

from resnet import BadInput, CheckFailed

PATIENCE_SECONDS = 60.0  # twice the usual grace of a server


class ServerProcess:
    """Starts a command that prints `serving on HOST:PORT`, and ends it with SIGTERM.

    Attributes:
        output: What it has printed so far, line by line.
        errors: What it has written to its error output so far, line by line.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        """Start the command, without waiting; `address` waits until it serves.

        Args:
            command: The command with its arguments.
            environment: Variables to set beside those of this process.
        """
        self.output: list[str] = []
        self.errors: list[str] = []
        self._command = command
        self._process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env={**os.environ, **(environment or {})},
        )
        self._address = ""
        self._decided = threading.Event()  # it serves, or has ended
        # Read all the time: a server whose pipe is full stops.
        self._readers = [
            threading.Thread(target=target, args=(pipe,), daemon=True)
            for target, pipe in ((self._read_output, self._process.stdout), (self._read_errors, self._process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    @property
    def address(self) -> str:
        """HOST:PORT, once the server listens there.

        Raises:
            BadInput: The process ended instead; the message has its error output.
        """
        self._decided.wait()
        if not self._address:
            self.wait(PATIENCE_SECONDS)
            raise BadInput(f"the server did not start: {''.join(self.errors).strip() or ' '.join(self._command)}")
        return self._address

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, unless the process has ended."""
        self._process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Wait for the process to end by itself, and return its exit code; a signal that ended it is negative.

        Raises:
            CheckFailed: It still runs after `seconds`.
        """
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise CheckFailed(f"the server (process {self.pid}) still runs after {seconds:g} s") from None
        for reader in self._readers:
            reader.join()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self.wait(PATIENCE_SECONDS)
        except CheckFailed:
            self._process.kill()
            self.wait(PATIENCE_SECONDS)
            raise

    def _read_output(self, pipe: IO[str]) -> None:
        with pipe:
            for line in pipe:
                self.output.append(line)
                if match := re.fullmatch(r"serving on (\S+)\n", line):
                    self._address = match[1]
                    self._decided.set()
        self._decided.set()

    def _read_errors(self, pipe: IO[str]) -> None:
        with pipe:
            self.errors.extend(pipe)


def serve(
    repository: Path | str, *options: str, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> ServerProcess:
    """Start `resnet serve` on a free port, with all that the repository holds.

    Args:
        repository: The model repository, a folder or a URL.
        options: Options of `resnet serve`; another --port overrides the free one.
        prefix: Command that runs the server, as `taskset -c 0`.
        environment: Variables to set beside those of this process.
    """
    command = [*prefix, sys.executable, "-m", "resnet", "serve", str(repository), "--port=0", "--strict", *options]
    return ServerProcess(command, environment)
