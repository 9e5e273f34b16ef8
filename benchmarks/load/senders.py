"""The two senders of the load generator: requests to a gRPC server, and calls of a function in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Self

import grpc

from benchmarks.load.endpoints import Endpoint
from benchmarks.load.generator import NOT_SENT, PATIENCE_SECONDS
from resnet import BadInput
from serving.client.channel import UNLIMITED

OPTIONS = (
    *UNLIMITED,
    ("grpc.enable_retries", 0),  # a refused request is counted, not repeated
    ("grpc.use_local_subchannel_pool", 1),  # each channel has a connection of its own
)
PENDING, PENDING_BYTES = 10_000, 256 * 2**20  # limits of the requests in flight, of one process
CODE_NAMES = {status.value[0]: status.name for status in grpc.StatusCode} | {NOT_SENT: "NOT_SENT"}
OK, UNKNOWN = grpc.StatusCode.OK.value[0], grpc.StatusCode.UNKNOWN.value[0]


class GrpcSender:
    """Sends the requests of an endpoint; waiting for a response occupies no thread."""

    failure = None  # the load goes on after an error: errors are counted

    def __init__(self, endpoint: Endpoint, connections: int = 1) -> None:
        """Connect, and have one request answered on each connection.

        Args:
            endpoint: The method to call, with its requests.
            connections: Connections that the slots use in turn.

        Raises:
            BadInput: The server does not answer, or not with OK.
        """
        self._requests, self._metadata = endpoint.requests, endpoint.access.metadata
        self.limit = min(PENDING, max(connections, PENDING_BYTES // max(1, *map(len, endpoint.requests))))
        self._channels = [endpoint.access.open_channel(endpoint.address, OPTIONS) for _ in range(connections)]
        self._methods: list[grpc.UnaryUnaryMultiCallable[bytes, bytes]]
        self._methods = [channel.unary_unary(endpoint.path) for channel in self._channels]
        try:
            for method in self._methods:
                method(self._requests[0], timeout=PATIENCE_SECONDS, wait_for_ready=True, metadata=self._metadata)
        except grpc.RpcError as error:
            self.close()
            raise BadInput(f"{endpoint.address} refused a request: {error.details()} ({error.code().name})") from None

    def send(self, slot: int, number: int, timeout: float, done: Callable[[int], None]) -> None:
        """Send one of the endpoint's requests; see `Sender.send`."""
        self.send_message(slot, self._requests[number % len(self._requests)], timeout, done)

    def send_message(self, slot: int, message: bytes, timeout: float, done: Callable[[int], None]) -> None:
        """Send a serialized request; see `Sender.send`."""
        call = self._methods[slot % len(self._methods)].future(message, timeout=timeout, metadata=self._metadata)
        call.add_done_callback(lambda _: done(call.code().value[0]))

    def close(self) -> None:
        """Close the connections."""
        for channel in self._channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class FunctionSender:
    """Calls a function in this process, on threads of its own; the first exception ends the load."""

    def __init__(self, function: Callable[[int], object], threads: int) -> None:
        """Start the threads.

        Args:
            function: Answers the request with this number.
            threads: Calls at a time.
        """
        self.limit = PENDING
        self.failure: Exception | None = None
        self._function = function
        self._requests: SimpleQueue[tuple[int, Callable[[int], None]] | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"load-{index}") for index in range(threads)]
        for thread in self._threads:
            thread.start()

    def send(self, slot: int, number: int, timeout: float, done: Callable[[int], None]) -> None:  # noqa: ARG002
        """Call the function on the next free thread; see `Sender.send`."""
        self._requests.put((number, done))

    def close(self) -> None:
        """End the threads."""
        for _ in self._threads:
            self._requests.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while request := self._requests.get():
            number, done = request
            try:
                self._function(number)
            except Exception as error:
                self.failure = self.failure or error
                done(UNKNOWN)
            else:
                done(OK)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
