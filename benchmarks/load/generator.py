"""The load generator: a closed or an open loop of requests, and the record of every request.

A closed loop keeps a number of requests in flight: the next one is sent when one is answered. An open loop sends each
request when it is due, whether earlier ones are answered or not. A `Sender` sends the requests: to a gRPC server, or as
calls of a function in this process. Times are in seconds from the start of the load, in every process.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from benchmarks.load.arrivals import ARRIVALS

PATIENCE_SECONDS = 60.0  # timeout of a request without a deadline
NOT_SENT = -1  # code of a request that found too many in flight


@dataclass(frozen=True)
class ClosedLoop:
    """A constant number of requests in flight."""

    in_flight: int


@dataclass(frozen=True)
class OpenLoop:
    """A rate in requests per second; `arrivals` is one of `ARRIVALS`."""

    rate: float
    arrivals: str = "poisson"
    seed: int = 0


Load = ClosedLoop | OpenLoop


class Trace(NamedTuple):
    """The record of a load: arrays with one element per request.

    Attributes:
        due: When the request was due; in a closed loop, when it was sent.
        sent: When the request was sent.
        done: When its response or error arrived.
        codes: Numbers of the gRPC status codes, or `NOT_SENT`.
    """

    due: NDArray[np.float64]
    sent: NDArray[np.float64]
    done: NDArray[np.float64]
    codes: NDArray[np.int64]


class Sender(Protocol):
    """Sends requests without waiting for their responses."""

    @property
    def limit(self) -> int:
        """Requests in flight that memory has room for; an open loop sends no more."""
        ...

    @property
    def failure(self) -> Exception | None:
        """The error that makes a load pointless; it ends closed loops and is raised in the end."""
        ...

    def send(self, slot: int, number: int, timeout: float, done: Callable[[int], None]) -> None:
        """Send one request.

        Args:
            slot: Which of the requests in flight it is; requests of one slot never overlap in a closed loop.
            number: Number of the request; consecutive numbers may have different content.
            timeout: Seconds until the request fails.
            done: Called on another thread with the number of the gRPC status code.
        """
        ...


def generate(
    sender: Sender, load: Load, seconds: float, deadline: float | None = None, worker: int = 0, workers: int = 1
) -> Trace:
    """Generate the share of a load that falls to one of several workers.

    Args:
        sender: Sends the requests.
        load: The load of all workers together.
        seconds: Duration; requests sent before its end are waited for.
        deadline: Timeout of a request in seconds.
        worker: Index of this worker.
        workers: Number of workers.
    """
    match load:
        case ClosedLoop(in_flight):
            return keep_in_flight(sender, range(worker, in_flight, workers), in_flight, seconds, deadline)
        case OpenLoop(rate, arrivals, seed):
            return send_at(sender, ARRIVALS[arrivals](rate, seconds, seed)[worker::workers].tolist(), deadline)


def keep_in_flight(
    sender: Sender, slots: Sequence[int], stride: int, seconds: float, deadline: float | None = None
) -> Trace:
    """Run a closed loop: keep one request in flight in each slot.

    Args:
        sender: Sends the requests.
        slots: Slots of this worker; the first request of a slot has its number.
        stride: Number of slots of all workers; the step from one request of a slot to the next.
        seconds: Duration.
        deadline: Timeout of a request in seconds.
    """
    run = _LoadRun(sender, deadline)
    for slot in slots:
        run.loop(slot, slot, stride, seconds)
    return run.wait(len(slots))


def send_at(sender: Sender, due: Sequence[float], deadline: float | None = None) -> Trace:
    """Run an open loop: send a request at each of these times, or as soon after it as possible.

    One that finds `sender.limit` requests in flight is recorded as not sent.
    """
    run = _LoadRun(sender, deadline)
    for number, at in enumerate(due):
        pause = at - run.now()
        if pause > 0:
            time.sleep(pause)
        run.send(number, at)
    return run.wait(len(due))


class _LoadRun:
    """One run of a loop with its record; a deadline counts from the time a request was due."""

    def __init__(self, sender: Sender, deadline: float | None) -> None:
        self._sender, self._patience = sender, deadline or PATIENCE_SECONDS
        self._records = array("d")  # four numbers for each request: due, sent, done, code
        self._started = 0
        self._ended = threading.Semaphore(0)
        self._start = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self._start

    def send(self, number: int, due: float) -> None:
        """Send a single request."""
        sent = self.now()
        if self._started - len(self._records) // 4 >= self._sender.limit:
            self._started += 1
            self._end(due, sent, NOT_SENT)
            return
        self._started += 1
        self._sender.send(number, number, due + self._patience - sent, partial(self._end, due, sent))

    def loop(self, slot: int, number: int, stride: int, until: float) -> None:
        """Send one request after the other."""
        sent = self.now()
        self._sender.send(slot, number, self._patience, partial(self._continue, slot, number, stride, sent, until))

    def wait(self, count: int) -> Trace:
        """Wait until this many single requests, or loops, have ended; raise the sender's failure if there is one."""
        for _ in range(count):
            self._ended.acquire()
        if self._sender.failure:
            raise self._sender.failure
        due, sent, done, codes = np.array(self._records).reshape(-1, 4).T
        return Trace(due, sent, done, codes.astype(int))

    def _continue(self, slot: int, number: int, stride: int, sent: float, until: float, code: int) -> None:
        self._record(sent, sent, code)
        if self.now() < until and not self._sender.failure:
            self.loop(slot, number + stride, stride, until)
        else:
            self._ended.release()

    def _end(self, due: float, sent: float, code: int) -> None:
        self._record(due, sent, code)
        self._ended.release()

    def _record(self, due: float, sent: float, code: int) -> None:
        self._records.extend((due, sent, self.now(), code))
