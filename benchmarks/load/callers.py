"""Callers of a server, in processes of their own: they send what is ready, and note when, and what came back.

A closed loop sends the next request when one is answered; an open loop sends each when it is due, whatever has become
of those before. Times are seconds from the start of a load, in every process.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple, Self

import grpc
import numpy as np
from numpy.typing import NDArray

from benchmarks.load.arrivals import ARRIVALS
from benchmarks.load.endpoints import Endpoint
from resnet import BadInput, CheckFailed
from serving.client.channel import UNLIMITED

PATIENCE_SECONDS = 60.0  # for an answer, where there is no deadline
OPTIONS = (
    *UNLIMITED,
    ("grpc.enable_retries", 0),  # what is refused is counted
    ("grpc.use_local_subchannel_pool", 1),  # each channel has a connection of its own
)


@dataclass(frozen=True)
class Closed:
    """So many requests in flight."""

    in_flight: int


@dataclass(frozen=True)
class Open:
    """So many requests a second, at times from one of `ARRIVALS`."""

    rate: float
    arrivals: str = "poisson"
    seed: int = 0


Load = Closed | Open


class Trace(NamedTuple):
    """What became of every request; arrays of one length.

    Attributes:
        due: When it was to be sent; in a closed loop, when it was.
        sent: When it was.
        done: When its answer or refusal came.
        codes: Numbers of gRPC's status codes.
    """

    due: NDArray[np.float64]
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    codes: NDArray[np.int64]


class Caller:
    """Sends the requests of an endpoint; any number wait for their answers without a thread."""

    def __init__(self, endpoint: Endpoint, connections: int = 1) -> None:
        """Connect.

        Args:
            endpoint: What to call.
            connections: Which the requests take in turn.

        Raises:
            BadInput: The server does not answer, or not with OK.
        """
        self._requests = endpoint.requests
        self._channels = [grpc.insecure_channel(endpoint.address, OPTIONS) for _ in range(connections)]
        self._methods: list[grpc.UnaryUnaryMultiCallable[bytes, bytes]]
        self._methods = [channel.unary_unary(endpoint.path) for channel in self._channels]
        try:
            for method in self._methods:
                method(self._requests[0], timeout=PATIENCE_SECONDS, wait_for_ready=True)
        except grpc.RpcError as error:
            raise BadInput(f"{endpoint.address} refused a request: {error.details()} ({error.code().name})") from None

    def keep(self, slots: Sequence[int], seconds: float, deadline: float | None = None) -> Trace:
        """Keep a request in flight for each slot, a number that is its own among all callers'."""
        run = _Run(self, deadline)
        for slot in slots:
            run.loop(slot, seconds)
        return run.wait(len(slots))

    def follow(self, due: Sequence[float], deadline: float | None = None) -> Trace:
        """Send a request at each of these times, or as soon after it as can be."""
        run = _Run(self, deadline)
        for number, at in enumerate(due):
            pause = at - run.now()
            if pause > 0:
                time.sleep(pause)
            run.send(number, at)
        return run.wait(len(due))

    def start(self, number: int, timeout: float, then: Callable[[int], None], message: bytes | None = None) -> None:
        """Send a request.

        Args:
            number: Of the request; also chooses the connection.
            timeout: Seconds.
            then: Takes the number of the status that comes of it, on another thread.
            message: To be sent in place of the endpoint's.
        """
        method = self._methods[number % len(self._methods)]
        call = method.future(message or self._requests[number % len(self._requests)], timeout=timeout)
        call.add_done_callback(lambda _: then(call.code().value[0]))

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Run:
    """One stretch of load: what was sent in it, and what came back; deadlines count from when a request was due."""

    def __init__(self, caller: Caller, deadline: float | None) -> None:
        self._caller, self._patience = caller, deadline or PATIENCE_SECONDS
        self._records: list[tuple[float, float, float, int]] = []
        self._ended = threading.Semaphore(0)
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def send(self, number: int, due: float) -> None:
        """Send one request."""
        sent = self.now()
        self._caller.start(number, due + self._patience - sent, partial(self._end, due, sent))

    def loop(self, number: int, until: float) -> None:
        """Send one request after the other."""
        sent = self.now()
        self._caller.start(number, self._patience, partial(self._again, number, sent, until))

    def wait(self, count: int) -> Trace:
        """Wait until so many single requests, or loops, have ended."""
        for _ in range(count):
            self._ended.acquire()
        due, sent, done, codes = np.array(self._records, float).reshape(-1, 4).T
        return Trace(due, sent, done, codes.astype(int))

    def _again(self, number: int, sent: float, until: float, code: int) -> None:
        self._note(sent, sent, code)
        if self.now() < until:
            self.loop(number, until)
        else:
            self._ended.release()

    def _end(self, due: float, sent: float, code: int) -> None:
        self._note(due, sent, code)
        self._ended.release()

    def _note(self, due: float, sent: float, code: int) -> None:
        self._records.append((due, sent, self.now(), code))


class Callers:
    """Callers in processes of their own, for the length of a block."""

    def __init__(self, endpoint: Endpoint, count: int = 1, connections: int = 1) -> None:
        """Start `count` processes, each with so many connections.

        Raises:
            BadInput: The server does not answer, or not with OK.
        """
        context = multiprocessing.get_context("spawn")  # gRPC has threads, which a fork would lose
        self._pipes: list[Connection] = []
        self.processes: list[multiprocessing.process.BaseProcess] = []
        for number in range(count):
            pipe, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, endpoint, connections, number, count), name=f"caller-{number}", daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(pipe)
            self.processes.append(process)
        try:
            self._gather()
        except BaseException:
            self.close()
            raise

    def run(self, load: Load, seconds: float, deadline: float | None = None) -> Trace:
        """Put the server under load, shared by all processes.

        Args:
            load: How much.
            seconds: For how long; what was sent until then is waited for.
            deadline: Seconds after which an answer is of no use.

        Raises:
            CheckFailed: A process has ended.
        """
        with suppress(ConnectionError):  # of a process that has ended; it will be missed below
            for pipe in self._pipes:
                pipe.send((load, seconds, deadline))
        return Trace(*map(np.concatenate, zip(*self._gather(), strict=True)))

    def close(self) -> None:
        """End the processes, whatever they do."""
        for process in self.processes:
            process.terminate()
            process.join()

    def _gather(self) -> list[Trace]:
        try:
            answers = [pipe.recv() for pipe in self._pipes]
        except (EOFError, ConnectionError):
            raise CheckFailed("a process of the load ended before it was done") from None
        for answer in answers:
            if isinstance(answer, BadInput):
                raise answer
        return answers

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(pipe: Connection, endpoint: Endpoint, connections: int, number: int, count: int) -> None:
    """Be one of `count` processes, until it is ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    try:
        caller = Caller(endpoint, connections)
    except BadInput as error:
        pipe.send(error)
        return
    answer: Trace | None = None
    while True:
        pipe.send(answer)
        load, seconds, deadline = pipe.recv()
        answer = call(caller, load, seconds, deadline, number, count)


def call(
    caller: Caller, load: Load, seconds: float, deadline: float | None = None, number: int = 0, count: int = 1
) -> Trace:
    """Have a caller do its share of a load, as the one of that number among so many."""
    match load:
        case Closed(in_flight):
            return caller.keep(range(number, in_flight, count), seconds, deadline)
        case Open(rate, arrivals, seed):
            return caller.follow(ARRIVALS[arrivals](rate, seconds, seed)[number::count].tolist(), deadline)
