"""What a server says of itself, and what the kernel says of it."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.load import server_side
from benchmarks.load.server_side import ServerTimes
from resnet import BadInput
from serving.client import Client


def test_the_server_counts_between_two_moments(address: str) -> None:
    """One request of three images is one batch of three; its parts are those of the protocol."""
    before = server_side.read_times(address, "digits")
    with Client(address) as client:
        client.classify(np.zeros((3, 32, 32, 3), np.uint8))
    times = server_side.read_times(address, "digits")
    assert before is not None
    assert times is not None
    times.add(before, -1)
    assert times.requests == 1
    assert times.mean_ms().keys() == {"queue", "decode", "compute", "respond"}
    assert times.batch_ms() == {3: pytest.approx(times.mean_ms()["compute"], rel=0.5)}


def test_a_server_that_does_not_count_is_none() -> None:
    """Nor one that is not there."""
    assert server_side.read_times("127.0.0.1:1", "digits") is None
    assert ServerTimes().mean_ms() == {}


def test_children_weigh_too() -> None:
    """A child that has touched 64 MiB and worked for a while adds to what its parent took."""
    work = "data = bytearray(b'x' * 2**26); sum(range(10**6)); print('done', flush=True); input()"
    before = server_side.read_usage(os.getpid())
    with subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after, alone = server_side.read_usage(os.getpid()), server_side.read_usage(child.pid)
        child.communicate(b"\n")
    assert after.cpu_seconds > before.cpu_seconds
    assert alone.peak_bytes > 2**26
    assert after.peak_bytes - before.peak_bytes > 2**26


def test_a_process_that_is_not_there_is_a_sentence() -> None:
    """No process has this number."""
    with pytest.raises(BadInput, match="there is no process 4194305; give the server's process id as --server-pid"):
        server_side.read_usage(2**22 + 1)
