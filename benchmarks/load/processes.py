"""The load generator in processes of its own, so that it shares no interpreter lock with whatever it measures."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, Self

import numpy as np

from benchmarks.load.endpoints import Endpoint
from benchmarks.load.generator import Load, Trace, generate
from benchmarks.load.senders import GrpcSender
from resnet import BadInput, CheckFailed


class _Connect(NamedTuple):
    """Tells a process to connect to an endpoint, in place of the one before."""

    endpoint: Endpoint
    connections: int


class _Generate(NamedTuple):
    """Tells a process to generate its share of a load."""

    load: Load
    seconds: float
    deadline: float | None


class LoadProcesses:
    """Processes that put one endpoint under load together, for the length of a `with` block."""

    def __init__(self, count: int = 1) -> None:
        """Start `count` processes."""
        context = multiprocessing.get_context("spawn")  # gRPC has threads, which a forked process would lack
        self._pipes: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for index in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, index, count), name=f"load-{index}", daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self.processes.append(process)

    def connect(self, endpoint: Endpoint, connections: int = 1) -> None:
        """Connect every process to an endpoint, with this many connections each; earlier connections are closed.

        Raises:
            BadInput: The server does not answer, or not with OK.
            CheckFailed: A process has ended.
        """
        self._command(_Connect(endpoint, connections))

    def run(self, load: Load, seconds: float, deadline: float | None = None) -> Trace:
        """Put the endpoint under a load that all processes share.

        Args:
            load: The load of all processes together.
            seconds: Duration; requests sent before its end are waited for.
            deadline: Timeout of a request in seconds.

        Raises:
            CheckFailed: A process has ended.
        """
        traces = self._command(_Generate(load, seconds, deadline))
        return Trace(*map(np.concatenate, zip(*traces, strict=True)))

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self.processes:
            process.terminate()
            process.join()

    def _command(self, command: _Connect | _Generate) -> Sequence[Trace]:
        """Return the results of a command that every process executes."""
        with suppress(ConnectionError):  # of a process that has ended, which shows below
            for pipe in self._pipes:
                pipe.send(command)
        try:
            results = [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError):
            raise CheckFailed("a process of the load generator ended before the load did") from None
        for result in results:
            if isinstance(result, BadInput):
                raise result
        return results

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(pipe: Connection, worker: int, workers: int) -> None:
    """Execute the commands of the parent process until it ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process
    threading.Thread(target=_end_with_parent, name="parent", daemon=True).start()
    sender: GrpcSender | None = None
    while True:
        try:
            command = pipe.recv()
        except EOFError:  # the parent process ends
            return
        result: Trace | BadInput | None = None
        if isinstance(command, _Connect):
            if sender:
                sender.close()
                sender = None
            try:
                sender = GrpcSender(command.endpoint, command.connections)
            except BadInput as error:
                result = error
        else:
            assert sender is not None, "`connect` comes before `run`"
            result = generate(sender, command.load, command.seconds, command.deadline, worker, workers)
        pipe.send(result)


def _end_with_parent() -> None:
    """End this process when its parent ends, however that happens: nobody would stop the load."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "the load generator starts this process"
    wait([parent.sentinel])
    os._exit(1)
