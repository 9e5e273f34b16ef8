"""A call, whatever it came by, and what a transport has to know of a method to have its calls answered."""

from __future__ import annotations

import itertools
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from serving.errors import REQUEST_ID, ServingError, Trailers

LONGEST_ID = 128
APART = 64
PROCESS, COUNTER = secrets.token_hex(4), itertools.count(1)  # of new ids; random ones cost a call of the system each

Metadata = Sequence[tuple[str, str | bytes]]


class Call(ABC):
    """A request that wants one answer, from whatever thread.

    Attributes:
        method: Path, /service/method.
        payload: The request as it came.
        metadata: That came with it.
        deadline: When the caller stops waiting, in seconds of `time.monotonic`; infinity if never.
        started: When it came, on the clock of `time.perf_counter_ns`.
        cancelled: Whether the caller has gone away.
        span: Of the trace that the call is part of, if there is one.
        trace_id: Id of the trace, for the log.
        ended: Is told of the answer, None or the error, once there is one.
        under_way: Those among which it counts until it is answered.
        refused: Whether it was answered by an error.
    """

    span: Any = None
    trace_id = ""
    ended: Callable[[ServingError | None], None] | None = None
    under_way: set[Call] | None = None
    refused = False

    def __init__(self, method: str, payload: bytes, metadata: Metadata, remaining: float | None) -> None:
        """Take a call in; `remaining` is how long the caller still waits, in seconds, and None is for ever."""
        self.method, self.payload, self.metadata = method, payload, metadata
        self.deadline = float("inf") if remaining is None else time.monotonic() + remaining
        self.started = time.perf_counter_ns()
        self.cancelled = False
        self._turn = [True]  # to answer; taken by whoever does so first

    def respond(self, response: bytes, trailers: Trailers = ()) -> None:
        """Send the response, unless there was an answer already; it goes nowhere if the caller is gone.

        Args:
            response: Serialized.
            trailers: What to tell beside it, as trailing metadata.
        """
        if self._take_turn():
            self._send(response, trailers)
            if self.ended:
                self.ended(None)

    def fail(self, error: ServingError) -> None:
        """Send an error in place of a response, unless there was an answer already."""
        if self._take_turn():
            self.refused = True
            self._refuse(error)
            if self.ended:
                self.ended(error)

    def is_wanted(self) -> bool:
        """Say whether the caller still waits."""
        return not self.cancelled

    @property
    def name(self) -> str:
        """Service/Method, for people: the path without the package."""
        return self.method.rpartition(".")[2]

    def find_id(self) -> str:
        """Return the id that the caller gave the request, as far as it is plain and short, or else a new one."""
        given = next((value for key, value in self.metadata if key == REQUEST_ID), "")
        plain = "".join(sign for sign in str(given) if "!" <= sign <= "~")
        return plain[:LONGEST_ID] or f"{PROCESS}-{next(COUNTER):x}"

    def forget(self) -> None:
        """Count no longer as under way."""
        if self.under_way is not None:
            self.under_way.discard(self)

    def _take_turn(self) -> bool:
        self.forget()
        try:
            return self._turn.pop()
        except IndexError:
            return False

    @property
    @abstractmethod
    def peer(self) -> str:
        """Address of the caller."""

    @abstractmethod
    def _send(self, response: bytes, trailers: Trailers) -> None:
        """Send the response."""

    @abstractmethod
    def _refuse(self, error: ServingError) -> None:
        """Send the error."""


class Unary(NamedTuple):
    """A method with one request and one response.

    Attributes:
        answer: Sees to it that a call is answered, now or later. It is called on the thread that all calls come
            through, so it must be quick, and raise nothing.
        limited: Whether its calls count against the limit of those under way; those that say how the server is do not.
    """

    answer: Callable[[Call], None]
    limited: bool = True


class Streaming(NamedTuple):
    """A method with any number of messages both ways.

    Attributes:
        answer: Maps the messages of the caller to those for it, serialized both. It has a thread while it lasts, and
            ends the call with the error that it raises.
        apart: Whether its calls have a limit of their own, `APART` at a time, and do not count against that of all:
            those that may last as long as the server.
    """

    answer: Callable[[Call, Iterator[bytes]], Iterator[bytes]]
    apart: bool = False


Methods = dict[str, Unary | Streaming]
"""By path."""
