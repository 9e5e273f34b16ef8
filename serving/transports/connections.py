"""The connections of a server that leaves them to its library, as the operating system knows them."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from serving.transports.unix import PREFIX

POLL_SECONDS = 0.005  # between looks at which connections are left


def disconnect(address: str, seconds: float) -> None:
    """End the listening and the connections of the server in this process that listens on HOST:PORT or unix:PATH.

    What was sent arrives first: a client reads up to the end, and closes its side. Calls under way fail there as
    UNAVAILABLE. The library still owns the sockets, and closes them.

    Args:
        address: Where the server listens.
        seconds: Time for clients to close their sides; later, what is under way to them is lost.
    """
    end = time.monotonic() + seconds
    for connection in _list_sockets(address):
        listens = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR if listens else socket.SHUT_WR)
    while any(map(_is_connected, _list_sockets(address))) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    for connection in _list_sockets(address):
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)


def _list_sockets(address: str) -> Iterator[socket.socket]:
    """Yield the sockets of a server in this process, each until the next is asked for."""
    path = address.removeprefix(PREFIX) if address.startswith(PREFIX) else None
    port = None if path else int(address.rpartition(":")[2])
    for file in Path("/dev/fd").iterdir():
        # Copies: the library may close its own, and another file have that number, at any time.
        with suppress(OSError), _copy(int(file.name)) as copy:
            name = copy.getsockname()
            if name == path if path else name[1:2] == (port,):
                yield copy


def _is_connected(connection: socket.socket) -> bool:
    """Return whether the other side has not closed the connection yet."""
    try:
        connection.getpeername()
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def _copy(descriptor: int) -> socket.socket:
    """Return the socket of a descriptor; raises an `OSError` if it has none."""
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
