"""Serve with too few threads, descriptors or memory: the server refuses in sentences, or ends with one.

Limits of the kernel are set a little above and below what an idle server takes. Under each, clients make calls, open
streams and connections, and send large images. While its health is SERVING the server must answer every call, with
whatever status, and it must end on SIGTERM within the grace. If it cannot start or go on, it ends with a line and
without a traceback. The last line of the output is one JSON object.

Examples:
  python -m tests.acceptance.scarcity demo/models --transport native
"""

from __future__ import annotations

import json
import resource
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import grpc

from benchmarks.harness.process import ServerProcess, serve
from resnet import BadInput, CheckFailed, cli
from resnet.table import render
from tests.acceptance.arguments import expect, parse
from tests.acceptance.attempts.attempt import encode
from tests.acceptance.bombs import draw
from tests.acceptance.callers import LOCAL, Callers
from tests.acceptance.footprint import MIB, Footprint
from tests.acceptance.messages import ModelUnderTest, ValidRequest
from tests.acceptance.users import as_nobody, give_to_nobody
from tests.acceptance.witness import describe, is_serving

GRACE_SECONDS = 5
PATIENCE_SECONDS = 20.0  # for a call
START_SECONDS = 60.0
CALLS, STREAMS, CONNECTIONS = 12, 12, 300
THREADS_UNDER_LOAD, DESCRIPTORS_UNDER_LOAD = 2.5, 5  # multiples of what an idle server has; the load needs more
HEADER = ("limit", "outcome")


class Scarcity(NamedTuple):
    """A limit of the kernel on a server.

    Attributes:
        title: The limit in words.
        prefix: Command that runs the server under it.
        tidy: Whether no traceback may show it; without memory, libraries that are not ours end as they can.
    """

    title: str
    prefix: Sequence[str]
    tidy: bool = True


def main() -> None:
    """Serve under each limit."""
    args = parse("scarcity", __doc__, transport="auto", steps=(5, "limits of each kind"))
    print(json.dumps(starve(args.repository, args.transport, args.steps)))


def starve(repository: Path, transport: str, steps: int) -> dict[str, object]:
    """Serve under each limit; return the number of each outcome.

    Raises:
        CheckFailed: A server hung, ended without a line, or with a traceback.
    """
    model = ModelUnderTest(repository)
    rows, failed = [], []
    counts: Counter[str] = Counter()
    nobody = as_nobody()
    with tempfile.TemporaryDirectory() as home:
        if nobody:
            give_to_nobody(Path(home))
        options = ("--no-tune", f"--grace={GRACE_SECONDS}", f"--transport={transport}", "--log-level=error")
        with serve(repository, *options, prefix=nobody, environment={"HOME": home}) as server:
            _call(server.address, model)
            idle, address_space = Footprint.read(server.pid), _read_address_space(server.pid)
        for scarcity in _list_scarcities(idle, address_space, nobody, steps):
            try:
                outcome = _starve(repository, model, scarcity, options, home)
                counts[outcome.partition(":")[0]] += 1
            except CheckFailed as error:
                failed.append(scarcity.title)
                outcome = f"FAILED: {error}"
            rows.append([scarcity.title, " ".join(outcome.split())[:300]])
            print(": ".join(rows[-1]), flush=True)
    print(f"\n{render(HEADER, rows, left=2)}\n")
    expect(not failed, f"{len(failed)} of {len(rows)} failed: {', '.join(failed)}")
    return {**counts} | ({} if nobody else {"SKIPPED": "limits on threads, which need root and setpriv"})


def _list_scarcities(idle: Footprint, address_space: int, nobody: Sequence[str], steps: int) -> Iterator[Scarcity]:
    """Yield the limits, from less than an idle server takes to more than the load needs."""
    for step in range(steps):
        share = 0.6 + 0.8 * step / max(1, steps - 1)  # 0.6 to 1.4
        if nobody:
            threads = round(idle.threads * share * THREADS_UNDER_LOAD)
            yield Scarcity(f"{threads} threads", [*nobody, "prlimit", f"--nproc={threads}"])
        descriptors = round(idle.descriptors * share * DESCRIPTORS_UNDER_LOAD)
        yield Scarcity(f"{descriptors} descriptors", ["prlimit", f"--nofile={descriptors}"])
        memory = round(address_space * share)
        yield Scarcity(f"{memory / MIB:.0f} MB of addresses", ["prlimit", f"--as={memory}"], tidy=False)


def _starve(repository: Path, model: ModelUnderTest, scarcity: Scarcity, options: Sequence[str], home: str) -> str:
    """Serve under one limit; return the outcome in words.

    Raises:
        CheckFailed: The server hung, ended without a line, or with a traceback.
    """
    environment = {"HOME": home}
    process = serve(repository, *options, prefix=scarcity.prefix, environment=environment)
    try:
        try:
            address = _await_address(process)
        except BadInput:
            _check_end(process, scarcity)
            return f"did not start: {_read_last(process)}"
        outcomes = _load(address, model)
        if process.alive and is_serving(address):
            _call(address, model)
        if process.alive:
            process.signal(signal.SIGTERM)
        _check_end(process, scarcity, GRACE_SECONDS + 5)
        ended = process.wait(0)
        return f"served: {outcomes}" if not ended else f"ended: {_read_last(process)}"
    finally:
        if process.alive:
            process.signal(signal.SIGKILL)
        process.wait(START_SECONDS)


def _await_address(process: ServerProcess) -> str:
    """Return the address of a server, once it serves.

    Raises:
        BadInput: It ended.
        CheckFailed: It does neither within `START_SECONDS`.
    """
    end = time.monotonic() + START_SECONDS
    while process.alive and not any(line.startswith("serving on") for line in process.output):
        expect(time.monotonic() < end, f"it neither serves nor ends in {START_SECONDS:.0f} s: {process.errors[-3:]}")
        time.sleep(0.05)
    return process.address


def _load(address: str, model: ModelUnderTest) -> str:
    """Put a server under every kind of load; return the outcomes in words."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        for _ in range(CONNECTIONS):
            with socket.socket() as connection:
                connection.settimeout(1)
                if connection.connect_ex((host, int(port))) == 0:
                    stack.enter_context(connection.dup())
        with Callers(address, model.classify(4), calls=CALLS, streams=STREAMS) as callers:
            time.sleep(1)
    bomb = encode([draw(8000, 8000, "JPEG", "RGB")])
    with grpc.insecure_channel(address, LOCAL) as channel:
        method: Any = channel.unary_unary(model.classify().path)
        calls = [method.future(bomb, timeout=PATIENCE_SECONDS) for _ in range(4)]
        codes = callers.outcomes + Counter(call.code().name for call in calls)
    expect(not {"DEADLINE_EXCEEDED", "CANCELLED"} & set(codes), f"calls are open for ever: {dict(codes)}")
    return ", ".join(f"{count} {code}" for code, count in codes.items())


def _call(address: str, model: ModelUnderTest) -> None:
    """Send a valid request, which must be answered with any status.

    Raises:
        CheckFailed: It was not.
    """
    request: ValidRequest = model.classify()
    with grpc.insecure_channel(address, LOCAL) as channel:
        method: Any = channel.unary_unary(request.path)
        try:
            method(request.message, timeout=PATIENCE_SECONDS)
        except grpc.RpcError as error:
            hung = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            expect(not hung, f"the health is SERVING, and a valid request is open for ever: {describe(error)}")


def _check_end(process: ServerProcess, scarcity: Scarcity, seconds: float = START_SECONDS) -> None:
    """Wait for the end of a server.

    Raises:
        CheckFailed: It does not end, or not with a line.
    """
    code = process.wait(seconds)
    text = "".join(process.errors)
    expect(not scarcity.tidy or "Traceback" not in text, f"a traceback: {' '.join(text.split())[-250:]}")
    expect(code == 0 or bool(text.strip()), f"it ended with {code} and without a line")
    expect(code >= 0 or code == -signal.SIGABRT, f"it ended by signal {-code}: {' '.join(text.split())[-250:]}")


def _read_last(process: ServerProcess) -> str:
    return process.errors[-1].strip() if process.errors else ""


def _read_address_space(pid: int) -> int:
    """Return the bytes of addresses that a process uses."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    sys.exit(cli.call(main, "error"))
