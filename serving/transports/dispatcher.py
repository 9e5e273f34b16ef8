"""From a call to its method: tokens and limits are checked here, for every transport."""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import suppress

from serving.config import Limits
from serving.errors import Overloaded, ServingError, TooLarge, Unavailable
from serving.transports.auth import Tokens
from serving.transports.call import MAX_SEPARATE, OVERLOADS, Call, Methods, Streaming, Unary, refuse

RETRY_MS = 100  # the time that most calls take, even of a busy server

log = logging.getLogger(__name__)


class Dispatcher:
    """Passes calls on to their methods, or refuses them.

    Attributes:
        methods: The methods of the server.
        limits: The limits that calls must keep.
        tokens: The tokens that callers need.
        active: The calls that count against the limit of active calls.
        refusals: Number of calls that were refused here, by the name of their status.
    """

    def __init__(self, methods: Methods, limits: Limits, tokens: Tokens) -> None:
        """Dispatch to `methods`, within `limits`, for callers with one of `tokens`."""
        self.methods, self.limits, self.tokens = methods, limits, tokens
        self.active: set[Call] = set()
        self.refusals: Counter[str] = Counter()
        # Strangers may watch: each method has its own limit, so that they leave the others to callers.
        self._separate: defaultdict[str, set[Call]] = defaultdict(set)
        self._closed = False

    def check(self, call: Call) -> ServingError | None:
        """Return why a call is refused before its request is read, None if it is not: its token is missing or wrong."""
        refusal = self.tokens.check(call)
        if refusal:
            self.refusals[refusal.status.name] += 1
        return refusal

    def dispatch(self, call: Call, method: Unary) -> None:
        """Have a call answered or refused, now or later. It raises nothing, which could end the receiving thread."""
        try:
            refusal = self._find_refusal(call, self.active if method.limited else None, self.limits.max_calls)
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
        active, limit = (
            (self._separate[call.method], MAX_SEPARATE) if method.separate else (self.active, self.limits.max_calls)
        )
        if refusal := self._find_refusal(call, active, limit):
            refusal.request_id = call.find_id()  # without a line in the log, which strangers could cause at will
            raise refusal
        try:
            yield from method.answer(call, requests)
        finally:
            call.leave()

    def close(self) -> None:
        """Refuse further calls, except those that count against no limit."""
        self._closed = True

    def drain(self, seconds: float) -> None:
        """Wait until every active call is answered, for `seconds` at most; then refuse the others."""
        end = time.monotonic() + seconds
        while self.active and time.monotonic() < end:
            time.sleep(0.01)
        for call in self.active.copy():
            with suppress(NotImplementedError):  # a stream ends by itself
                call.fail(Unavailable("the server is shutting down, and had no time for this request"))

    def _find_refusal(self, call: Call, active: set[Call] | None, limit: int) -> ServingError | None:
        """Return why a call is refused; None counts it among the `active` calls."""
        refusal = self._find_fault(call) or (self._admit(call, active, limit) if active is not None else None)
        if refusal:
            self.refusals[refusal.status.name] += 1
        return refusal

    def _admit(self, call: Call, active: set[Call], limit: int) -> ServingError | None:
        if self._closed:
            return Unavailable("the server is shutting down")
        if len(active) >= limit:
            kind = "" if active is self.active else f" of {call.name}"
            OVERLOADS.add(reason := f"the server has {limit} calls{kind} under way")
            return Overloaded(reason, RETRY_MS)
        call.active = active
        active.add(call)
        return None

    def _find_fault(self, call: Call) -> ServingError | None:
        """Return why a call is refused whatever the load."""
        if refusal := self.tokens.check(call):
            return refusal
        limit = self.limits.max_message_bytes
        if len(call.payload) > limit:
            return TooLarge(f"the request has {len(call.payload):,} bytes, more than the {limit:,} allowed")
        return None
