"""Addresses that cannot be listened on: which reason the operating system gives."""

from __future__ import annotations

import errno
import socket

from resnet import BadInput
from serving.transports.unix import PREFIX

REASONS = {
    errno.EADDRINUSE: "the port is in use; choose another with {option}",
    errno.EADDRNOTAVAIL: "this machine does not have that address; choose another with --host",
    errno.EAFNOSUPPORT: "this machine has no addresses of that kind; choose another with --host",
    errno.EACCES: "this user may not use the port; choose one above 1023 with {option}",
}


def cannot_listen(address: str, option: str = "--port") -> BadInput:
    """Return the error for an address, HOST:PORT or unix:PATH, that a library cannot listen on; they give no reason.

    Args:
        address: The address.
        option: What chooses its port.
    """
    return BadInput(f"the server cannot listen on {address}: {_find_reason(address).format(option=option)}")


def _find_reason(address: str) -> str:
    if address.startswith(PREFIX):
        return "the socket cannot be made; choose another path with --host"
    host, _, port = address.rpartition(":")
    try:
        found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError):
        return "there is no host of that name; choose another with --host"
    for family, kind, protocol, _, place in found:
        try:
            with socket.socket(family, kind, protocol) as attempt:
                attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                attempt.bind(place)
        except OSError as error:
            return REASONS.get(error.errno or 0, f"{error.strerror}; choose another with --host or {{option}}")
    return "the library gives no reason; choose another with --host or {option}"
