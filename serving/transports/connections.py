"""The connections of a server that leaves them to its library, as the operating system knows them."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

from serving.transports.unix import PREFIX


def disconnect(address: str) -> None:
    """End the connections of the server in this process that listens on HOST:PORT or unix:PATH, and its listening.

    The clients' calls under way fail as UNAVAILABLE. Their library still owns the sockets, and closes them.
    """
    path = address.removeprefix(PREFIX) if address.startswith(PREFIX) else None
    port = None if path else int(address.rpartition(":")[2])
    for file in Path("/dev/fd").iterdir():
        # Of a copy: the library may close its own, and another file have that number, at any time.
        with suppress(OSError), _copy(int(file.name)) as connection:
            name = connection.getsockname()
            if name == path if path else name[1:2] == (port,):
                connection.shutdown(socket.SHUT_RDWR)


def _copy(descriptor: int) -> socket.socket:
    """Return the socket of a descriptor; raises an `OSError` if it has none."""
    copy = os.dup(descriptor)
    try:
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
