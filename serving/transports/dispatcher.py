"""From a call to its method: tokens and limits are checked here, for every transport."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import suppress

from serving.config import Limits
from serving.errors import Overloaded, ServingError, TooLarge, Unavailable
from serving.transports.auth import Tokens
from serving.transports.call import MAX_SEPARATE, Call, Methods, Streaming, Unary, refuse

log = logging.getLogger(__name__)


class Dispatcher:
    """Passes calls on to their methods, or refuses them.

    Attributes:
        methods: The methods of the server.
        limits: The limits that calls must keep.
        active: The calls that count against the limit of active calls.
    """

    def __init__(self, methods: Methods, limits: Limits, tokens: Tokens) -> None:
        """Dispatch to `methods`, within `limits`, for callers with one of `tokens`."""
        self.methods, self.limits, self._tokens = methods, limits, tokens
        self.active: set[Call] = set()
        self._separate: set[Call] = set()

    def dispatch(self, call: Call, method: Unary) -> None:
        """Have a call answered or refused, now or later. It raises nothing, which could end the receiving thread."""
        try:
            refusal = self._admit(call) if method.limited else self._check(call)
            if refusal is None:
                method.answer(call)
            else:
                call.fail(refusal)
        except Exception as error:
            try:
                refuse(call, error)
            except BaseException:  # also that of a library that is written in Rust, which is no Exception
                log.exception("a call could not be answered")

    def stream(self, call: Call, method: Streaming, requests: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the responses of a streaming call; raises the error that ends it."""
        if refusal := self._admit(call, method.separate):
            refusal.request_id = call.find_id()  # without a line in the log, which strangers could cause at will
            raise refusal
        try:
            yield from method.answer(call, requests)
        finally:
            call.leave()

    def drain(self, seconds: float) -> None:
        """Wait until every active call is answered, for `seconds` at most; then refuse the others."""
        end = time.monotonic() + seconds
        while self.active and time.monotonic() < end:
            time.sleep(0.01)
        for call in self.active.copy():
            with suppress(NotImplementedError):  # a stream ends by itself
                call.fail(Unavailable("the server is shutting down, and had no time for this request"))

    def _admit(self, call: Call, separate: bool = False) -> ServingError | None:
        """Count a call as active, or return why it is refused."""
        if refusal := self._check(call):
            return refusal
        active, limit = (self._separate, MAX_SEPARATE) if separate else (self.active, self.limits.max_calls)
        if len(active) >= limit:
            kind = " that watch or reflect" if separate else ""
            return Overloaded(f"the server has {limit} calls under way{kind}")
        call.active = active
        active.add(call)
        return None

    def _check(self, call: Call) -> ServingError | None:
        """Return why a call is refused whatever the load."""
        if refusal := self._tokens.check(call):
            return refusal
        limit = self.limits.max_message_bytes
        if len(call.payload) > limit:
            return TooLarge(f"the request has {len(call.payload):,} bytes, more than the {limit:,} allowed")
        return None
