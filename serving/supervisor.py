"""Several front ends on one port, and one process that computes for them: started, watched, replaced, and ended.

```
               ┌> serving.frontend ─┐   a socket and shared memory each
    port ──────┼> serving.frontend ─┼──> serving.backend: models, batchers, engines
               └> serving.frontend ─┘
```

The supervisor itself takes no request and computes nothing, so that nothing but a signal should end it. What it tells
the others is in `serving.child`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import msgspec

from resnet import BadInput, CheckFailed
from serving.child import DRAIN, SCAN, Report, Task, encode
from serving.config import Config
from serving.cores import count_cores

PAUSE_SECONDS = 1.0  # before a process is started again that did not come as far as to be ready
SLACK_SECONDS = 5.0  # for a process to end, beyond the time that requests have

log = logging.getLogger(__name__)


def choose(config: Config) -> int:
    """Return how many front ends to start; 0 is to do without.

    A GPU computes more than one process can take in; a CPU has no cores to spare for others.
    """
    if config.frontends is not None or config.transport == "native":
        return config.frontends or 0
    cores = count_cores()
    return min(cores - 2, 12) if cores >= 4 and _has_gpu(config) else 0


def _has_gpu(config: Config) -> bool:
    if config.device == "cpu" or not (Path("/dev/nvidiactl").exists() and find_spec("onnxruntime")):
        return False
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def run(config: Config, count: int) -> None:
    """Serve with so many front ends until SIGTERM or Ctrl-C, then drain.

    Raises:
        BadInput: The port cannot be had, or what keeps a process from its work.
        CheckFailed: A process did not start.
    """
    log.info("processes that take requests: %d; one more computes", count)
    with _claim(config) as claim:
        asyncio.run(_supervise(dataclasses.replace(config, port=claim.getsockname()[1]), count))


def _claim(config: Config) -> socket.socket:
    """Return a socket that holds the port, and never listens; front ends that end leave it to those that follow."""
    try:
        host = config.host.strip("[]")
        family, _, _, _, address = socket.getaddrinfo(host, config.port, type=socket.SOCK_STREAM)[0]
        claim = socket.socket(family)
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        claim.bind(address)  # fails where somebody listens; from then on front ends may
        claim.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        raise BadInput(
            f"{config.host}:{config.port} cannot be listened on; is the port in use? Choose another with --port"
        ) from None
    return claim


async def _supervise(config: Config, count: int) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    knock, door = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    backend = Process("serving.backend", config, door)
    frontends = [Process("serving.frontend", config, knock) for _ in range(count)]
    loop.add_signal_handler(signal.SIGHUP, backend.order, SCAN)
    kept = {process: asyncio.ensure_future(process.keep()) for process in (backend, *frontends)}
    stopped = asyncio.ensure_future(stop.wait())
    announced = asyncio.ensure_future(_announce(f"{config.host}:{config.port}", kept))
    try:
        await asyncio.wait([stopped, *kept.values()], return_when=asyncio.FIRST_COMPLETED)
        announced.cancel()
        for task in kept.values():
            if task.done():
                task.result()  # raises what kept a process from its work
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)  # a second one does not wait
        print("finishing the requests under way", flush=True)
        for group in (frontends, [backend]):  # what the ones have under way needs the other
            for process in group:
                process.end()
            await asyncio.wait([kept[process] for process in group], timeout=config.grace + SLACK_SECONDS)
    finally:
        for process in kept:
            process.kill()
        await asyncio.gather(*kept.values(), return_exceptions=True)


async def _announce(address: str, processes: Iterable[Process]) -> None:
    for process in processes:
        await process.ready.wait()
    print(f"serving on {address}", flush=True)


class Process:
    """A process of the service, and the one that takes its place when it dies."""

    def __init__(self, module: str, config: Config, door: socket.socket) -> None:
        """Start nothing yet.

        Args:
            module: What it runs.
            config: Of the service.
            door: See `serving.child.Task`.
        """
        self._module, self._config, self._door = module, config, door
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._started = self._ending = False
        self.ready = asyncio.Event()
        """Set when it is ready for the first time."""

    async def keep(self) -> None:
        """Start the process, and another one whenever it has ended, until `end`.

        Raises:
            BadInput: The first one ended before it was ready, for a reason that the user can mend.
            CheckFailed: It ended before it was ready, for another one.
        """
        while not self._ending:
            report, code = await self._run()
            if self._ending:
                return
            if not self.ready.is_set():
                reason = report.reason or f"{self._module} ended with {code} before it was ready"
                raise (BadInput if report.code == 2 else CheckFailed)(reason)
            log.error("%s ended with %d and is replaced%s", self._module, code, report.reason and f": {report.reason}")
            if report != Report():
                await asyncio.sleep(PAUSE_SECONDS)

    async def _run(self) -> tuple[Report, int]:
        """Run one process; return what it said last, and its exit code."""
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", self._module),
                stdin=theirs.fileno(),
                pass_fds=[self._door.fileno()],
                start_new_session=True,  # Ctrl-C is for the supervisor
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},  # the same code as here
            )
        if self._ending:
            self._process.kill()
        reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        self._writer.write(encode(Task(self._config, self._door.fileno(), again=self.ready.is_set())))
        report = Report(1)
        try:
            while line := await reader.readline():
                report = msgspec.json.decode(line, type=Report)
                if not report.code:
                    self._started = True
                    self.ready.set()
        except ConnectionError:
            pass  # it was killed before it had read all
        self._started = False
        code = await self._process.wait()
        self._writer.close()
        return report, code

    def order(self, order: str) -> None:
        """Have it do something."""
        if self._writer:
            self._writer.write(f"{order}\n".encode())

    def end(self) -> None:
        """Have it finish what is under way, and end; one that has not started yet is killed."""
        self._ending = True
        if self._started:
            self.order(DRAIN)
        else:
            self.kill()

    def kill(self) -> None:
        """End it now."""
        self._ending = True
        if self._process and self._process.returncode is None:
            self._process.kill()
