"""Threads that start with the server, and a process that ends without one of them."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from queue import SimpleQueue

import pytest

from resnet import BadInput
from serving.threads import EXIT_CODE, WorkerPool, check_room


class Panic(BaseException):
    """As libraries in Rust raise it."""


def list_threads(name: str) -> list[threading.Thread]:
    """Return the threads of a pool."""
    return [thread for thread in threading.enumerate() if thread.name.startswith(f"{name}-")]


def test_a_pool_has_its_threads_before_it_needs_them() -> None:
    """They end with it, and keep no process from ending."""
    pool = WorkerPool(3, "early")
    threads = list_threads("early")
    assert len(threads) == 3
    assert all(thread.daemon for thread in threads)
    del pool
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("error", [ValueError("odd"), Panic()])
def test_no_error_ends_a_thread_of_a_pool(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    """It is in the log; what comes after is run in its order."""
    ran: SimpleQueue[int] = SimpleQueue()

    def fail() -> None:
        raise error

    pool = WorkerPool(1, "steady")
    pool.submit(fail)
    pool.submit(ran.put, 1)
    pool.submit(ran.put, 2)
    assert [ran.get(timeout=10), ran.get(timeout=10)] == [1, 2]
    assert "fail failed" in caplog.text
    assert pool.done >= 2
    pool.close()
    for thread in list_threads("steady"):
        thread.join(10)
    assert pool.done == 3


def test_a_pool_that_cannot_have_its_threads_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process may have no further one: that is told at the start, not in the middle of a request."""
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(BadInput, match="the server cannot start its threads: raise the limit") as refusal:
        WorkerPool(2, "limited")
    del refusal
    gc.collect()
    started[0].join(10)
    assert not started[0].is_alive()


def test_a_process_that_may_not_have_enough_threads_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a library needs one and ends the process; those that were started end."""
    start, started = threading.Thread.start, []

    def limited(thread: threading.Thread) -> None:
        if len(started) == 5:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(BadInput, match="the server cannot start its threads: raise the limit"):
        check_room(6)
    for thread in started:
        thread.join(10)
    assert not any(thread.is_alive() for thread in started)
    started.clear()
    check_room(5)


FAILS = """
import threading
from resnet import BadInput
from serving.threads import start_vital
def fail():
    raise ValueError("odd")
start_vital(fail, "heart")
threading.Event().wait()
"""
NATIVE = """
import threading
from serving.config import Limits
from serving.transports.auth import Tokens
from serving.transports.dispatcher import Dispatcher
from serving.transports.native import NativeTransport
transport = NativeTransport(Dispatcher({}, Limits(), Tokens("localhost", None, None)))
transport.listen("127.0.0.1:0")
class Front:
    def start(self): pass
    def recv_batch_details(self, size): raise ValueError("odd")
transport._front = Front()
transport.start()
threading.Event().wait()
"""


@pytest.mark.parametrize(("code", "name"), [(FAILS, "heart"), (NATIVE, "receive")], ids=["any", "native"])
def test_a_process_ends_with_the_thread_that_it_cannot_live_without(code: str, name: str) -> None:
    """With a line and a traceback, though another thread waits for ever."""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == EXIT_CODE
    line = (
        f"the process ends with code {EXIT_CODE}: the thread '{name}' failed, without which the server answers nothing"
    )
    assert line in ended.stderr
    assert "ValueError: odd" in ended.stderr


DEAF = """
import logging, sys
from serving import threads
threads.LOG_SECONDS = 0.1
logging.basicConfig(stream=sys.stderr)
threads.end_process("x" * 10_000_000)
"""


def test_a_process_ends_though_nobody_reads_its_log() -> None:
    """The pipe is full; perhaps that was the reason."""
    process = subprocess.Popen([sys.executable, "-c", DEAF], stderr=subprocess.PIPE)
    assert process.wait(timeout=60) == EXIT_CODE
    assert process.stderr is not None
    process.stderr.close()
