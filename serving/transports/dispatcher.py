"""What every call passes before it is answered, whatever it came by: tokens and limits."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from serving.config import Limits
from serving.errors import Overloaded, ServingError, TooLarge
from serving.protocols.calls import refuse
from serving.transports.auth import Tokens
from serving.transports.call import APART, Call, Methods, Streaming, Unary

log = logging.getLogger(__name__)


class Dispatcher:
    """Lets calls in, or refuses them.

    Attributes:
        methods: Those that are served.
        limits: What is taken on.
        under_way: Calls that count against the limits.
    """

    def __init__(self, methods: Methods, limits: Limits, tokens: Tokens) -> None:
        """Serve `methods` to those who have one of `tokens`, within `limits`."""
        self.methods, self.limits, self._tokens = methods, limits, tokens
        self.under_way: set[Call] = set()
        self._apart: set[Call] = set()

    def answer(self, call: Call, method: Unary) -> None:
        """Have a call answered or refused, now or later; raises nothing, which could end the thread of all calls."""
        try:
            refusal = self._judge(call) if method.limited else self._check(call)
            if refusal is None:
                method.answer(call)
            else:
                call.fail(refusal)
        except Exception as error:
            try:
                refuse(call, error)
            except Exception:
                log.exception("a call was lost")

    def converse(self, call: Call, method: Streaming, messages: Iterator[bytes]) -> Iterator[bytes]:
        """Yield the answers to the messages of a call; raises the error that ends it."""
        if refusal := self._judge(call, method.apart):
            refusal.request_id = call.find_id()  # as if it had been logged, which strangers could cause at will
            raise refusal
        try:
            yield from method.answer(call, messages)
        finally:
            call.forget()

    def drain(self, seconds: float) -> None:
        """Wait until every call is answered, at most so long."""
        end = time.monotonic() + seconds
        while self.under_way and time.monotonic() < end:
            time.sleep(0.01)

    def _judge(self, call: Call, apart: bool = False) -> ServingError | None:
        """Return why a call is not let in; one that is counts as under way, among all others or `apart`."""
        if refusal := self._check(call):
            return refusal
        among, most = (self._apart, APART) if apart else (self.under_way, self.limits.max_calls)
        if len(among) >= most:
            return Overloaded(f"the server has {most} calls under way{' that watch or reflect' if apart else ''}")
        call.under_way = among
        among.add(call)
        return None

    def _check(self, call: Call) -> ServingError | None:
        """Return what is wrong with a call itself."""
        if refusal := self._tokens.judge(call):
            return refusal
        allowed = self.limits.max_message_bytes
        if len(call.payload) > allowed:
            return TooLarge(f"the request has {len(call.payload):,} bytes, more than the {allowed:,} allowed")
        return None
