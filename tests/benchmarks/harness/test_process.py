"""A server process is started, heard and ended, and one that does not end is found."""

from __future__ import annotations

import signal
import sys

import pytest

from benchmarks.harness.process import ServerProcess
from resnet import BadInput, CheckFailed

SERVE = "import sys, time; print('serving on 127.0.0.1:1', flush=True); print('x' * 200_000); time.sleep(60)"


def start(code: str, **environment: str) -> ServerProcess:
    """Start Python code as a server."""
    return ServerProcess([sys.executable, "-c", code], environment)


def test_a_server_says_where_it_listens() -> None:
    """Once it does, however much it prints after that; SIGTERM ends it."""
    with start(SERVE) as server:
        assert server.address == "127.0.0.1:1"
        assert server.alive
    assert not server.alive
    assert server.wait(0) == -signal.SIGTERM


def test_a_server_that_ends_at_once_says_why() -> None:
    """Its error output is the reason."""
    with (
        start("import os, sys; sys.exit(os.environ['REASON'])", REASON="no models") as server,
        pytest.raises(BadInput, match="did not start: no models"),
    ):
        _ = server.address


def test_a_server_that_does_not_end_is_an_error() -> None:
    """Nobody waits for ever."""
    with start(SERVE) as server:
        with pytest.raises(CheckFailed, match="still runs after 0 s"):
            server.wait(0)
        server.signal(signal.SIGKILL)
        assert server.wait(30) == -signal.SIGKILL
