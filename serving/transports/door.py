"""What every call passes before it is answered, whatever it came by: tokens and limits."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from serving.calls import refuse
from serving.errors import Overloaded, ServingError, TooLarge
from serving.limits import Limits
from serving.transports.auth import Tokens
from serving.transports.call import Call, Methods, Streaming, Unary

log = logging.getLogger(__name__)


class Door:
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

    def answer(self, call: Call, method: Unary) -> None:
        """Have a call answered or refused, now or later; raises nothing, which could end the thread of all calls."""
        try:
            refusal = self._judge(call, method.limited)
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
        if refusal := self._judge(call, method.limited):
            refusal.request_id = call.find_id()  # as if it had been logged, which strangers could cause at will
            raise refusal
        try:
            yield from method.answer(call, messages)
        finally:
            call.forget()

    def _judge(self, call: Call, limited: bool) -> ServingError | None:
        """Return why a call is not let in; one that is counts as under way, if it is to be `limited`."""
        limits = self.limits
        if refusal := self._tokens.judge(call):
            return refusal
        if len(call.payload) > limits.max_message_bytes:
            return TooLarge(
                f"the request has {len(call.payload):,} bytes, more than the {limits.max_message_bytes:,} allowed"
            )
        if limited:
            if len(self.under_way) >= limits.max_calls:
                return Overloaded(f"the server has {limits.max_calls} calls under way")
            call.under_way = self.under_way
            self.under_way.add(call)
        return None


def find_unary(methods: Methods) -> dict[str, Unary]:
    """Return the methods with one request and one response."""
    return {path: method for path, method in methods.items() if isinstance(method, Unary)}
