"""Which transport receives calls, and why."""

from __future__ import annotations

import functools
from typing import Literal

from resnet import BadInput
from serving.config import Transport


def is_local(host: str) -> bool:
    """Return whether a server on `host` can be reached from this machine only."""
    return host in ("localhost", "::1", "[::1]") or host.startswith(("127.", "unix:"))


@functools.cache
def find_problem() -> str:
    """Return why the native transport cannot be used on this machine; empty if it can."""
    try:
        import pygrpc_native  # noqa: F401
    except ImportError as error:  # there are no wheels for every platform
        return f"pygrpc-native cannot be loaded ({error})"
    return ""


def choose(wanted: Transport, host: str, tls: bool) -> tuple[Literal["native", "grpcio"], str]:
    """Return the transport that receives calls, and why.

    Raises:
        BadInput: The wanted transport cannot be used.
    """
    if wanted == "native" and tls:
        raise BadInput("--tls-cert needs --transport grpcio: the native transport has no TLS")
    if wanted == "native" and (problem := find_problem()):
        raise BadInput(f"--transport native cannot be used, for {problem}; run pip install pygrpc-native")
    if wanted != "auto":
        return wanted, "by --transport"
    if tls:
        return "grpcio", "for TLS"
    if problem := find_problem():
        return "grpcio", f"for {problem}, which answers several times as many calls"
    if is_local(host):
        return "native", "for callers on this machine"
    return "grpcio", "for callers elsewhere; --transport native answers several times as many calls of trusted ones"
