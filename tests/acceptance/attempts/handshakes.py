"""Clients that must not get an encrypted connection, and the certificates of both sides."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from serving import client
from tests.acceptance.attempts.attempt import CLASSIFY, LIMITS, AttemptOutcome, LimitAttempt, LimitTarget
from tests.acceptance.certificates import Pair, issue


def handshakes(folder: Path) -> Iterator[LimitAttempt]:
    """Yield clients that must not get a connection; writes the certificates of server and client to `folder`."""
    authority, stranger = issue("authority"), issue("stranger")
    authority.write(folder, "authority")
    issue("server", authority).write(folder, "server")
    issue("client", authority).write(folder, "client")
    root = authority.pem()[0]

    def connect(tls: client.Tls | None) -> Callable[[LimitTarget], AttemptOutcome]:
        return lambda target: LimitTarget(target.address, target.shape, tls).call(CLASSIFY, b"", timeout=10)

    def own(pair: Pair) -> client.Tls:
        certificate, key = pair.pem()
        return client.Tls(root, certificate, key)

    # With TLS 1.3 a client learns that its certificate is refused only after its side of the handshake.
    yield LimitAttempt("open text to an encrypted port", connect(None), "UNAVAILABLE")
    yield LimitAttempt("no client certificate", connect(client.Tls(root)), "UNAVAILABLE")
    yield LimitAttempt("a foreign client certificate", connect(own(issue("client", stranger))), "UNAVAILABLE")
    yield LimitAttempt(
        "an expired client certificate", connect(own(issue("client", authority, days=-1))), "UNAVAILABLE"
    )
    yield LimitAttempt(
        "a connection that never shakes hands", silent, "closed", f"^after {LIMITS.handshake_seconds:.0f} s"
    )
    yield LimitAttempt("a server of another authority", connect(client.Tls(stranger.pem()[0])), "UNAVAILABLE")


def silent(target: LimitTarget) -> AttemptOutcome:
    """Connect and send nothing: keepalive cannot end this, since there is no HTTP/2 connection yet."""
    host, _, port = target.address.rpartition(":")
    with socket.create_connection((host, int(port)), LIMITS.handshake_seconds + 10) as connection:
        started = time.monotonic()
        while connection.recv(4096):
            pass
        return AttemptOutcome("closed", f"after {time.monotonic() - started:.0f} s")


def read_client_pair(folder: Path) -> tuple[bytes, bytes]:
    """Return the certificate and the key of the client that `handshakes` wrote."""
    return (folder / "client.crt").read_bytes(), (folder / "client.key").read_bytes()
