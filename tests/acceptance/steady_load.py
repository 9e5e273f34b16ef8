"""Clients in a process of their own that send images at a steady rate, and read which version answered what."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count, cycle
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Self

import grpc

from benchmarks.load.generator import OpenLoop, generate
from protos import classifier_pb2 as pb
from resnet import CheckFailed
from tests.acceptance.attempts.attempt import CLASSIFY
from tests.acceptance.witness import describe

STRETCH_SECONDS = 0.5  # of load, until the next look at whether to stop
PATIENCE_SECONDS = 30.0  # for a connection
PENDING = 2000  # requests in flight, at most


class LoadAnswer(NamedTuple):
    """An answer to an image.

    Attributes:
        request: Index of the request.
        version: The version that answered.
        class_: Index of the most probable class.
    """

    request: int
    version: int
    class_: int


class SteadyLoad:
    """Sends requests in turn, at Poisson arrivals, from the begin of a `with` block to its end.

    Attributes:
        answers: Number of each answer; filled at the end of the block.
        failures: Number of each failure, by its status and message; likewise.
    """

    def __init__(self, address: str, messages: Sequence[bytes], rate: float) -> None:
        """Take a server.

        Args:
            address: HOST:PORT.
            messages: Serialized requests of one image to our own protocol.
            rate: Requests a second.
        """
        self.answers: Counter[LoadAnswer] = Counter()
        self.failures: Counter[str] = Counter()
        self._pipe, self._theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # gRPC has threads, which a forked process would lack
        arguments = (self._theirs, address, list(messages), rate)
        self._process = context.Process(target=_send, args=arguments, daemon=True)

    @property
    def count(self) -> int:
        """Requests that ended."""
        return self.answers.total() + self.failures.total()

    def __enter__(self) -> Self:
        self._process.start()
        self._theirs.close()
        self._receive()  # it sends
        return self

    def __exit__(self, *_: object) -> None:
        try:
            with suppress(ConnectionError):  # of a process that has ended, which shows below
                self._pipe.send(None)
            self.answers, self.failures = self._receive()
        finally:
            self._process.terminate()
            self._process.join()

    def _receive(self) -> Any:
        """Return what the process says next.

        Raises:
            CheckFailed: It has ended.
        """
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            raise CheckFailed("the process that sends requests has ended; its error is above") from None


class _ReadingSender:
    """Sends requests, and reads their answers; see `benchmarks.load.generator.Sender`."""

    limit, failure = PENDING, None

    def __init__(self, channel: grpc.Channel, messages: Sequence[bytes]) -> None:
        self.answers: Counter[LoadAnswer] = Counter()
        self.failures: Counter[str] = Counter()
        self._method: Any = channel.unary_unary(CLASSIFY, response_deserializer=pb.ClassifyResponse.FromString)
        self._messages = messages
        self._turns = cycle(range(len(messages)))  # through all stretches, each of which begins at 0

    def send(self, slot: int, number: int, timeout: float, done: Callable[[int], None]) -> None:  # noqa: ARG002
        request = next(self._turns)
        call = self._method.future(self._messages[request], timeout=timeout)
        call.add_done_callback(partial(self._read, request, done))

    def _read(self, request: int, done: Callable[[int], None], call: Any) -> None:
        code: grpc.StatusCode = call.code()
        if code is grpc.StatusCode.OK:
            response = call.result()
            class_ = response.classifications[0].classes[0].index
            self.answers[LoadAnswer(request, response.version, class_)] += 1
        else:
            self.failures[describe(call)] += 1
        done(code.value[0])


def _send(pipe: Connection, address: str, messages: list[bytes], rate: float) -> None:
    """Send requests until the parent process says so, then tell it what became of them."""
    with grpc.insecure_channel(address, [("grpc.enable_retries", 0)]) as channel:
        grpc.channel_ready_future(channel).result(PATIENCE_SECONDS)
        sender = _ReadingSender(channel, messages)
        pipe.send(None)
        for stretch in count():
            generate(sender, OpenLoop(rate, seed=stretch), STRETCH_SECONDS)
            if pipe.poll():
                break
    pipe.send((sender.answers, sender.failures))
