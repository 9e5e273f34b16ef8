"""Streams of requests: each message is a call of its own, and many of them are under way at a time.

A thread reads, so that several requests of a stream can be in one batch; the thread of the call answers. Neither
computes: a client that sends or reads slowly keeps nobody waiting but itself.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Protocol

from serving.errors import Malformed, ServingError, Trailers, Unavailable
from serving.protocols.calls import report
from serving.transports.call import Call

READ_AHEAD = 64  # requests that are read and not answered; the .proto tells clients


class StreamItem(Call):
    """A message of a stream, as a call.

    Attributes:
        id: What the caller calls it, where the protocol has that.
        answer: The message for the caller, once there is one, or the error that ends the stream.
    """

    def __init__(self, stream: Stream, call: Call, payload: bytes) -> None:
        super().__init__(call.method, payload, call.metadata, None)
        self.deadline, self.span, self.trace_id = call.deadline, call.span, call.trace_id
        self._stream, self._call = stream, call
        self.id = 0
        self.answer: bytes | ServingError | None = None

    def is_wanted(self) -> bool:
        """Say whether the caller still waits."""
        return self._call.is_wanted()

    @property
    def peer(self) -> str:
        """Address of the caller."""
        return self._call.peer

    def _send(self, response: bytes, _: Trailers) -> None:
        self._stream.put(self, self._stream.dialect.respond(self, response))

    def _refuse(self, error: ServingError) -> None:
        ends = isinstance(error, Malformed)  # what comes after it cannot be trusted either
        self._stream.put(self, error if ends else self._stream.dialect.refuse(self, error))


class StreamProtocol(Protocol):
    """What the messages of one stream are like."""

    ordered: bool
    """Whether answers come in the order of the requests."""

    def begin(self, item: StreamItem) -> None:
        """Have a message answered, as a call; raises what is wrong with it."""
        ...

    def respond(self, item: StreamItem, response: bytes) -> bytes:
        """Return the message that answers another."""
        ...

    def refuse(self, item: StreamItem, error: ServingError) -> bytes | ServingError:
        """Return the message that says why there is no answer, or the error that ends the stream."""
        ...


class Streams:
    """The streams of a server that are open."""

    def __init__(self) -> None:
        """Begin with none."""
        self._open: set[Stream] = set()
        self._closed = False

    def answer(
        self, dialect: Callable[[Call], StreamProtocol], call: Call, messages: Iterator[bytes]
    ) -> Iterator[bytes]:
        """Yield the answers to the messages of a call, of which `dialect` says what they are like."""
        stream = Stream(call, dialect(call))
        self._open.add(stream)
        try:
            if self._closed:
                stream.close()
            yield from stream.answer(messages)
        finally:
            self._open.discard(stream)

    def close(self) -> None:
        """End them, once what they have read is answered."""
        self._closed = True
        for stream in self._open.copy():
            stream.close()


class Stream:
    """A stream while it is open; `dialect` says what its messages are like."""

    def __init__(self, call: Call, dialect: StreamProtocol) -> None:
        self._call, self.dialect = call, dialect
        self._room = threading.Semaphore(READ_AHEAD)
        self._items: deque[StreamItem] = deque()  # in the order in which they came, if they are answered in it
        self._ready: SimpleQueue[StreamItem | None] = SimpleQueue()  # None: no further one is read, or awaited
        self._read = 0  # counted by the reader only
        self._closing = self._left = False

    def answer(self, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the answers, until the client has half-closed and has them all, or the server shuts down."""
        threading.Thread(target=self._follow, args=(messages,), name="stream", daemon=True).start()
        answered, ending = 0, False
        fatal: ServingError | None = None
        try:
            while not (ending and answered == self._read):
                item = self._ready.get()
                if item is None:
                    ending = True
                    continue
                for ready in self._in_order() if self.dialect.ordered else (item,):
                    if isinstance(ready.answer, ServingError):
                        fatal = ready.answer  # those that came before it are answered first
                    else:
                        assert ready.answer is not None, "what is ready has its answer"
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

    def put(self, item: StreamItem, answer: bytes | ServingError) -> None:
        """Have an item answered."""
        item.answer = answer
        self._ready.put(item)

    def close(self) -> None:
        """Answer what was read, then end the call as UNAVAILABLE."""
        self._closing = True
        self._ready.put(None)

    def _in_order(self) -> Iterator[StreamItem]:
        while self._items and self._items[0].answer is not None:
            yield self._items.popleft()

    def _follow(self, messages: Iterator[bytes]) -> None:
        """Read the requests, as far ahead as is allowed."""
        try:
            while self._room.acquire() and not self._left and (message := next(messages, None)) is not None:
                self._read += 1
                item = StreamItem(self, self._call, message)
                if self.dialect.ordered:
                    self._items.append(item)
                try:
                    self.dialect.begin(item)
                except Exception as error:
                    item.fail(report(item, error))
                if isinstance(item.answer, ServingError):
                    return  # the end of the stream
        finally:
            self._ready.put(None)
