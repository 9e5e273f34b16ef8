"""Restart two servers in turn under our client, which has the addresses of both: no request fails.

Each server ends by SIGTERM while requests are under way, and starts again on its port; once it serves, the other one is
restarted. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.restarts demo/models --requests 1000 --restarts 4
"""

from __future__ import annotations

import json
import signal
import socket
import sys
import threading
from contextlib import ExitStack
from pathlib import Path

from benchmarks.harness.process import ServerProcess, serve
from resnet import CheckFailed, cli
from serving.client import Client
from tests.acceptance.arguments import parse
from tests.acceptance.messages import ModelUnderTest

THREADS = 4
GRACE_SECONDS = 30


def main() -> None:
    """Restart the servers."""
    args = parse(
        "restarts",
        __doc__,
        transport="auto",
        requests=(5000, "requests, at least"),
        restarts=(14, "restarts, at least"),
    )
    print(json.dumps(restart(args.repository, args.transport, args.requests, args.restarts)))


def restart(repository: Path, transport: str, requests: int, restarts: int) -> dict[str, int]:
    """Restart two servers in turn until there were enough restarts and requests; return the numbers of both.

    Raises:
        CheckFailed: A request failed.
    """
    model = ModelUnderTest(repository)
    ports = [_find_port() for _ in range(2)]
    done = 0
    with ExitStack() as stack:

        def start(port: int) -> ServerProcess:
            options = (f"--port={port}", f"--transport={transport}", "--no-tune", "--log-level=error")
            return stack.enter_context(serve(repository, *options))

        servers = [start(port) for port in ports]
        addresses = [server.address for server in servers]
        with _Requests(addresses, model) as sent:
            while done < restarts or sent.count < requests:
                index = done % 2
                servers[index].signal(signal.SIGTERM)
                servers[index].wait(GRACE_SECONDS + 5)
                servers[index] = start(ports[index])
                _ = servers[index].address  # waits until it serves
                done += 1
                print(f"{done} restarts, {sent.count:,} requests, {len(sent.failures)} failed", flush=True)
                if sent.failures:
                    break
    if sent.failures:
        raise CheckFailed(f"{len(sent.failures)} of {sent.count:,} requests failed: {'; '.join(sent.failures[:5])}")
    return {"requests": sent.count, "failed": 0, "restarts": done}


class _Requests:
    """Threads that classify images over one client, until the end of a `with` block."""

    def __init__(self, addresses: list[str], model: ModelUnderTest) -> None:
        self.failures: list[str] = []
        self._counts = [0] * THREADS
        self._addresses, self._pixels = addresses, model.pixels
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(index,)) for index in range(THREADS)]

    @property
    def count(self) -> int:
        return sum(self._counts)

    def _run(self, index: int) -> None:
        while not self._stopped.wait(0.002):
            try:
                self._client.classify(self._pixels[index : index + 1 + index % 3])
            except Exception as error:
                self.failures.append(f"{type(error).__name__}: {error}")
            self._counts[index] += 1

    def __enter__(self) -> _Requests:
        self._client = Client(self._addresses)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()
        self._client.close()


def _find_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
