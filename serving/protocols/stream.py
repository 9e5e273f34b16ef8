"""Streams: each request is a call of its own, and many of them are active at a time.

One thread reads, so that several requests of a stream can share a batch; the thread of the call writes. Neither
computes: a client that sends or reads slowly delays only itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

from serving.errors import Malformed, Overloaded, ServingError, Trailers, Unavailable
from serving.transports.call import Call, report

READ_AHEAD = 64  # requests that are read and not answered; the .proto documents it


class StreamItem(Call):
    """A request of a stream, as a call.

    Attributes:
        id: The caller's id of it, where the protocol has one.
        answer: The serialized response, or the error that ends the stream; None until there is one.
    """

    def __init__(self, stream: Stream, call: Call, payload: bytes) -> None:
        super().__init__(call.method, payload, call.metadata, None)
        self.deadline, self.span, self.trace_id = call.deadline, call.span, call.trace_id
        self._stream, self._call = stream, call
        self.id = 0
        self.answer: bytes | ServingError | None = None

    def is_active(self) -> bool:
        """Return whether the caller still waits."""
        return self._call.is_active()

    @property
    def peer(self) -> str:
        """Address of the caller."""
        return self._call.peer

    def _find_own_key(self) -> str:
        return self._call.find_id()  # one version for the whole stream

    def _send(self, response: bytes, _: Trailers) -> None:
        self._stream.complete(self, self._stream.protocol.respond(self, response))

    def _send_error(self, error: ServingError) -> None:
        answer: bytes | ServingError = error
        if not isinstance(error, Malformed):  # else the requests after it cannot be trusted either
            try:
                answer = self._stream.protocol.refuse(self, error)
            except Exception as bug:
                answer = report(self, bug)  # which ends the stream: a request without an answer would hold it for ever
        self._stream.complete(self, answer)


class StreamProtocol(Protocol):
    """The messages of one stream, as its protocol has them."""

    ordered: bool
    """Whether responses come in the order of the requests."""

    def begin(self, item: StreamItem) -> None:
        """Pass a request to the handler, like a call; raise an error if it is invalid."""
        ...

    def respond(self, item: StreamItem, response: bytes) -> bytes:
        """Return the message that carries a response."""
        ...

    def refuse(self, item: StreamItem, error: ServingError) -> bytes | ServingError:
        """Return the message that carries an error, or the error that ends the stream."""
        ...


class Streams:
    """The open streams of a server."""

    def __init__(self) -> None:
        self._open: set[Stream] = set()
        self._closed = False

    def answer(self, make: Callable[[Call], StreamProtocol], call: Call, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the responses to the requests of a call, whose stream has the protocol that `make` returns."""
        stream = Stream(call, make(call))
        self._open.add(stream)
        try:
            if self._closed:
                stream.close()
            yield from stream.answer(requests)
        finally:
            self._open.discard(stream)

    def close(self) -> None:
        """End all streams, once the requests that they have read are answered."""
        self._closed = True
        for stream in self._open.copy():
            stream.close()

    def abort(self) -> None:
        """End all streams at once."""
        for stream in self._open.copy():
            stream.abort()


class Stream:
    """An open stream."""

    def __init__(self, call: Call, protocol: StreamProtocol) -> None:
        self._call, self.protocol = call, protocol
        self._room = threading.Semaphore(READ_AHEAD)
        self._items: deque[StreamItem] = deque()  # in order of arrival, if they are answered in that order
        self._ready: SimpleQueue[StreamItem | None] = SimpleQueue()  # None: no further request is read
        self._read = 0  # counted by the reader only
        self._closing = self._aborted = self._left = False

    def answer(self, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the responses, until the client has half-closed and has them all, or the server shuts down."""
        try:
            threading.Thread(target=self._read_all, args=(requests,), name="stream", daemon=True).start()
        except RuntimeError:
            raise Overloaded("the server cannot start a further thread, which each stream needs") from None
        answered, ending = 0, False
        fatal: ServingError | None = None
        try:
            while not (ending and answered == self._read):
                item = self._ready.get()
                if item is None:
                    ending = True
                    if self._aborted:
                        break
                    continue
                for ready in self._in_order() if self.protocol.ordered else (item,):
                    if isinstance(ready.answer, ServingError):
                        fatal = ready.answer  # requests before it are answered first
                    else:
                        assert ready.answer is not None, "a ready item has its answer"
                        yield ready.answer
                    answered += 1
                    self._room.release()
        finally:
            self._left = True
            self._room.release()
        if fatal:
            raise fatal
        if self._closing:
            raise Unavailable("the server is shutting down")

    def complete(self, item: StreamItem, answer: bytes | ServingError) -> None:
        """Queue an item whose answer can be sent."""
        item.answer = answer
        self._ready.put(item)

    def close(self) -> None:
        """Answer the requests that were read, then end the call as UNAVAILABLE."""
        self._closing = True
        self._ready.put(None)

    def abort(self) -> None:
        """End the call as UNAVAILABLE, whatever was read."""
        self._aborted = True
        self.close()

    def _in_order(self) -> Iterator[StreamItem]:
        while self._items and self._items[0].answer is not None:
            yield self._items.popleft()

    def _read_all(self, requests: Iterator[bytes]) -> None:
        """Read the requests, up to `READ_AHEAD` without an answer."""
        try:
            while self._room.acquire() and not self._left and (request := next(requests, None)) is not None:
                if self._closing:
                    return
                self._read += 1
                item = StreamItem(self, self._call, request)
                if self.protocol.ordered:
                    self._items.append(item)
                try:
                    self.protocol.begin(item)
                except Exception as error:
                    item.fail(report(item, error))
                if isinstance(item.answer, ServingError):
                    return  # the stream ends
        finally:
            self._ready.put(None)
