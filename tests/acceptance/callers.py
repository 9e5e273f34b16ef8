"""Clients that keep a server busy, and record the outcome of every request."""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, Self

import grpc

from protos import classifier_pb2 as pb
from tests.acceptance.messages import ValidRequest
from tests.acceptance.witness import describe

STREAM = "/resnet.v1.Classifier/ClassifyStream"
IN_FLIGHT = 8  # requests of a stream
PATIENCE_SECONDS = 30.0
LOCAL = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]


class Callers:
    """Threads that send requests one after the other during a `with` block, each over a connection of its own.

    A caller stops when the server is gone: after the first UNAVAILABLE.

    Attributes:
        outcomes: Number of requests by the name of their status.
        messages: For each status but OK, the message of the last such failure.
    """

    def __init__(self, address: str, request: ValidRequest, *, calls: int = 0, streams: int = 0) -> None:
        """Take a server.

        Args:
            address: HOST:PORT.
            request: A request of our own protocol.
            calls: Threads that make a call for each request.
            streams: Threads that send their requests over one stream.
        """
        self.outcomes: Counter[str] = Counter()
        self.messages: dict[str, str] = {}
        self._address, self._request = address, request
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._streams: list[Any] = []
        self._threads = [threading.Thread(target=self._call, name="caller") for _ in range(calls)]
        self._threads += [threading.Thread(target=self._stream, name="stream") for _ in range(streams)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self.join()

    def join(self) -> None:
        """Wait until all callers have stopped; a stream that then stays silent is cancelled, and recorded so."""
        end = time.monotonic() + PATIENCE_SECONDS
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        for stream in self._streams:
            stream.cancel()
        for thread in self._threads:
            thread.join()

    def others(self, *allowed: str) -> str:
        """Return the outcomes with other statuses than these, in words; empty without one."""
        return ", ".join(
            f"{count} {code} ({self.messages.get(code, '')})"
            for code, count in self.outcomes.items()
            if code not in allowed
        )

    def _call(self) -> None:
        with grpc.insecure_channel(self._address, LOCAL) as channel:
            method: Any = channel.unary_unary(self._request.path)
            while not self._stopped.is_set():
                try:
                    method(self._request.message, timeout=PATIENCE_SECONDS)
                except grpc.RpcError as error:
                    self._record(error.code().name, describe(error))
                    if error.code() is grpc.StatusCode.UNAVAILABLE:
                        return
                else:
                    self._record("OK")

    def _stream(self) -> None:
        tickets: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        request = pb.ClassifyRequest.FromString(self._request.message)

        def send() -> Iterator[bytes]:
            for number in iter(tickets.get, None):
                yield pb.ClassifyStreamRequest(id=number, request=request).SerializeToString()

        with grpc.insecure_channel(self._address, LOCAL) as channel:
            method: Any = channel.stream_stream(STREAM)
            responses = method(send())
            self._streams.append(responses)
            for number in range(IN_FLIGHT):
                tickets.put(number + 1)
            number = open_ = IN_FLIGHT
            try:
                for message in responses:
                    failure = pb.ClassifyStreamResponse.FromString(message).failure
                    self._record(_name(failure.code), failure.message)
                    if self._stopped.is_set():
                        open_ -= 1
                        if not open_:
                            tickets.put(None)
                    else:
                        number += 1
                        tickets.put(number)
            except grpc.RpcError as error:
                self._record(error.code().name, describe(error))
            tickets.put(None)

    def _record(self, code: str, message: str = "") -> None:
        with self._lock:
            self.outcomes[code] += 1
            self.messages[code] = message


def _name(code: int) -> str:
    return next(status.name for status in grpc.StatusCode if status.value[0] == code)
