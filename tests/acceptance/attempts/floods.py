"""Floods of streams, calls, connections and frames, and silent clients: what a client can do that ignores rules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

from tests.acceptance import wire
from tests.acceptance.attempts.attempt import CLASSIFY, LIMITS, STREAM, TOKEN, AttemptOutcome, LimitAttempt, LimitTarget
from tests.acceptance.wire import Http2Connection, pack_headers

# With timeouts so short that a test can wait for them.
SHORT_TIMEOUTS = replace(LIMITS, idle_seconds=6, keepalive_seconds=1, keepalive_timeout_seconds=1)


def floods() -> Iterator[LimitAttempt]:
    """Yield attempts to send more of something than is allowed."""

    def streams(target: LimitTarget) -> AttemptOutcome:
        with Http2Connection(target.address) as connection:
            hold(connection, LIMITS.max_streams + 1)
            for frame in connection.frames():
                if frame.kind == wire.RST_STREAM:
                    return AttemptOutcome(
                        "RST_STREAM", f"{int.from_bytes(frame.payload, 'big')}, which is ENHANCE_YOUR_CALM"
                    )
        return AttemptOutcome("closed")

    yield LimitAttempt(f"{LIMITS.max_streams + 1} streams on one connection", streams, "RST_STREAM", "^11,")

    def calls(target: LimitTarget) -> AttemptOutcome:
        with ExitStack() as stack:
            for _ in range(4):
                connection = stack.enter_context(Http2Connection(target.address))
                hold(connection, LIMITS.max_calls // 4)
                connection.await_answers(LIMITS.max_calls // 4)
            return target.call(CLASSIFY, b"")

    yield LimitAttempt(
        f"{LIMITS.max_calls + 1} calls on several connections", calls, "RESOURCE_EXHAUSTED", "calls under way"
    )

    def connections(target: LimitTarget) -> AttemptOutcome:
        with ExitStack() as stack:
            for _ in range(LIMITS.max_connections):
                next(stack.enter_context(Http2Connection(target.address)).frames())
            return target.call(CLASSIFY, b"")

    yield LimitAttempt(f"{LIMITS.max_connections + 1} connections", connections, "UNAVAILABLE")
    yield LimitAttempt("1,000 pings", flood(lambda _: (wire.PING, 0, 0, bytes(8)), 1000), "GOAWAY", "too_many_pings")
    yield LimitAttempt("100,000 settings", flood(lambda _: (wire.SETTINGS, 0, 0, b""), 100_000), "closed or ignored")
    headers = pack_headers(CLASSIFY, [("authorization", f"Bearer {TOKEN}")])
    reset = (8).to_bytes(4, "big")

    def opened_and_reset(number: int) -> tuple[int, int, int, bytes]:
        stream = number // 2 * 2 + 1
        return (wire.RST_STREAM, 0, stream, reset) if number % 2 else (wire.HEADERS, wire.END_HEADERS, stream, headers)

    yield LimitAttempt("20,000 streams, opened and reset", flood(opened_and_reset, 40_000), "closed or ignored")
    more = pack_headers(CLASSIFY, [("x-large", "x" * 16_000)])
    yield LimitAttempt(
        "48 MB of headers in one call",
        flood(lambda number: (wire.CONTINUATION if number else wire.HEADERS, 0, 1, more if number else headers), 3000),
        "closed or ignored",
    )


def silent_clients() -> Iterator[LimitAttempt]:
    """Yield connections that a server with `SHORT_TIMEOUTS` closes."""
    patience = SHORT_TIMEOUTS.idle_seconds + 10

    def closes(open_: Callable[[Http2Connection], None], answers: bool) -> Callable[[LimitTarget], AttemptOutcome]:
        def run(target: LimitTarget) -> AttemptOutcome:
            end = time.monotonic() + patience
            with Http2Connection(target.address, patience) as connection:
                open_(connection)
                for frame in connection.frames():
                    if frame.kind == wire.GOAWAY:
                        return AttemptOutcome("GOAWAY", wire.explain_goaway(frame.payload))
                    if time.monotonic() > end:
                        return AttemptOutcome("open", f"after {patience:.0f} s")
                    if answers and frame.kind == wire.PING and not frame.flags:
                        connection.send(wire.PING, wire.ACK, 0, frame.payload)
            return AttemptOutcome("closed")

        return run

    yield LimitAttempt(
        "a stream whose client is dead", closes(lambda connection: hold(connection, 1), False), "GOAWAY", "ping_timeout"
    )
    yield LimitAttempt("a connection whose client is dead", closes(lambda _: None, False), "GOAWAY", "ping_timeout")
    yield LimitAttempt("a connection without calls", closes(lambda _: None, True), "GOAWAY", "idle")


def hold(connection: Http2Connection, count: int) -> None:
    """Open streams that stay open, with a request on each that the server answers."""
    headers = pack_headers(STREAM, [("authorization", f"Bearer {TOKEN}")])
    for number in range(count):
        connection.send(wire.HEADERS, wire.END_HEADERS, 2 * number + 1, headers)
        connection.send(wire.DATA, 0, 2 * number + 1, wire.pack_message(b""))


def flood(frame: Callable[[int], tuple[int, int, int, bytes]], count: int) -> Callable[[LimitTarget], AttemptOutcome]:
    """Return an attempt that sends many frames, and then reads how the server reacted."""

    def run(target: LimitTarget) -> AttemptOutcome:
        sent = 0
        with Http2Connection(target.address, 5) as connection:
            try:
                for sent in range(count):
                    connection.send(*frame(sent))
            except OSError:
                pass
            ignored = AttemptOutcome("closed or ignored", f"{sent + 1:,} of {count:,} frames sent")
            try:
                for answer in connection.frames():
                    if answer.kind == wire.GOAWAY and b"too_many" in answer.payload:
                        return AttemptOutcome("GOAWAY", f"{wire.explain_goaway(answer.payload)}, at frame {sent + 1:,}")
            except TimeoutError:
                pass
            return ignored

    return run
