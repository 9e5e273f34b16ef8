"""Signals of the server's process: SIGTERM and Ctrl-C end it, SIGHUP has it look for new versions."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, Self

STOP = signal.SIGTERM, signal.SIGINT


class Signals:
    """Takes signals while the main thread is in its `with` block; none is lost, however many arrive.

    No Python code runs in a handler: a lock that it takes may be held by the code that it interrupts. The interpreter's
    own handler writes a byte to a socket, whichever thread a signal reaches (a wait for a lock would end in the main
    thread only), and the main thread reads it.
    """

    def __init__(self) -> None:
        self._received: SimpleQueue[int | None] = SimpleQueue()

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        # A full buffer drops a byte, not a signal: the handler below keeps them all.
        self._descriptor = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        # Called with the number and a frame, which stands for `block` and has no effect. A Python function could be
        # interrupted by the next signal, and that one by the next.
        put: Any = self._received.put
        self._handlers = {number: signal.signal(number, put) for number in (*STOP, signal.SIGHUP)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor)
        self._reader.close()
        self._writer.close()

    def wait(self) -> int | None:
        """Return the next signal, or None after `run` has finished its action."""
        while True:
            with suppress(Empty):
                return self._received.get_nowait()
            self._reader.recv(4096)

    def run(self, action: Callable[[], object]) -> bool:
        """Run an action on another thread, and wait for it or for a signal to stop.

        Returns:
            Whether the action has finished. If not, it still runs.

        Raises:
            BaseException: What the action raised.
        """
        outcome: Future[None] = Future()

        def work() -> None:
            try:
                action()
                outcome.set_result(None)
            except BaseException as error:
                outcome.set_exception(error)
            self._received.put(None)
            with suppress(OSError):  # full, which wakes the main thread as well; or closed, as nobody waits any more
                self._writer.send(b"\0")

        threading.Thread(target=work, name="load", daemon=True).start()
        rescan = False
        while (number := self.wait()) is not None:
            if number in STOP:
                return False
            rescan = True
        if rescan:
            self._received.put(signal.SIGHUP)
        outcome.result()
        return True

    def restore_stop(self) -> None:
        """Let a further SIGTERM or Ctrl-C end the process at once."""
        for number in STOP:
            signal.signal(number, signal.SIG_DFL)
