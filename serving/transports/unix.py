"""Unix sockets: `unix:PATH` in place of a host and a port."""

from __future__ import annotations

import os
import socket
import stat
from contextlib import suppress
from pathlib import Path

from resnet import BadInput

PREFIX = "unix:"
MAX_PATH = 107  # bytes, on Linux


def claim(host: str) -> Path:
    """Return the path of unix:PATH, free for a new socket; a socket that nobody listens on is removed.

    Raises:
        BadInput: No socket can be made there.
    """
    path = Path(host.removeprefix(PREFIX))
    if not path.name:
        raise BadInput(f"--host {host} names no socket; write unix:PATH")
    if len(os.fsencode(path)) > MAX_PATH:
        raise BadInput(f"the path in --host {host} is longer than the {MAX_PATH} bytes that a socket's may have")
    if not path.parent.is_dir():
        raise BadInput(f"{path.parent} of --host {host} is no folder; make it, or choose another path")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise BadInput(f"{path.parent} of --host {host} cannot be written to; choose another path")
    with suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise BadInput(f"{path} of --host {host} is no socket and stays as it is; choose another path")
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()  # its server is gone
            except OSError as error:
                raise BadInput(f"{path} of --host {host} cannot be used ({error.strerror})") from None
            else:
                raise BadInput(f"a server listens on {path} already; choose another path with --host")
    return path
