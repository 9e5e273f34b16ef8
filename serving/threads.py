"""Threads that a server cannot live without: they start with it, no error ends them, or else the process ends.

A thread that starts on demand may find that the process may have no further one. A thread that ends on an error leaves
a server that looks healthy and answers nothing.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue

from resnet import BadInput

EXIT_CODE = 70  # of a process that cannot go on: EX_SOFTWARE of sysexits.h
NEEDED = 48  # threads of a server that starts; on two cores it has 23, those of its libraries included
LOG_SECONDS = 5.0  # for the last line: whoever reads the log may be stuck, too

log = logging.getLogger(__name__)


class WorkerPool:
    """A fixed number of threads that run what they are given, in order of arrival.

    All of them start at once. An error in what they run goes to the log. They end when the pool is closed or
    garbage-collected, and do not keep a process from ending.
    """

    def __init__(self, threads: int, name: str) -> None:
        """Start the threads, and name them.

        Raises:
            BadInput: The process may have no further thread.
        """
        self._work: SimpleQueue[_Work | None] = SimpleQueue()
        self._done = [0] * threads
        # Nothing that a thread holds refers to the pool.
        weakref.finalize(self, _end, self._work, threads)
        for number in range(threads):
            args = self._work, self._done, number
            _start(threading.Thread(target=_run, args=args, name=f"{name}-{number}", daemon=True))

    @property
    def done(self) -> int:
        """How much was run so far."""
        return sum(self._done)

    def submit(self, function: Callable[..., object], /, *args: object) -> None:
        """Call a function on one of the threads as soon as one is free; this never fails."""
        self._work.put((function, args))

    def close(self) -> None:
        """End the threads when they have run what was submitted."""
        _end(self._work, len(self._done))


_Work = tuple[Callable[..., object], tuple[object, ...]]


def check_room(count: int = NEEDED) -> None:
    """Check that this process may have `count` threads more: a library that cannot start one ends it without a word.

    Raises:
        BadInput: It may not.
    """
    checked = threading.Event()
    try:
        for _ in range(count):
            _start(threading.Thread(target=checked.wait, daemon=True))
    finally:
        checked.set()


def start_vital(run: Callable[[], object], name: str) -> None:
    """Run a function on a thread of its own; if it fails, end the process: it can do nothing without.

    Raises:
        BadInput: The process may have no further thread.
    """

    def guard() -> None:
        try:
            run()
        except BaseException as error:
            end_process(f"the thread {name!r} failed, without which the server answers nothing", error)

    _start(threading.Thread(target=guard, name=name, daemon=True))


def end_process(reason: str, error: BaseException | None = None) -> None:
    """Log why, and end the process at once with `EXIT_CODE`, whatever its other threads do."""

    def write() -> None:
        log.critical("the process ends with code %d: %s", EXIT_CODE, reason, exc_info=error)
        logging.shutdown()

    try:
        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        writer.join(LOG_SECONDS)
    except RuntimeError:  # the process may have no further thread
        write()
    finally:
        os._exit(EXIT_CODE)


def _start(thread: threading.Thread) -> None:
    try:
        thread.start()
    except RuntimeError:
        raise BadInput(
            "the server cannot start its threads: raise the limit on them, of the user (ulimit -u) or the container, "
            "or that on memory"
        ) from None


def _run(work: SimpleQueue[_Work | None], done: list[int], number: int) -> None:
    """Run what comes, until None does."""
    while item := work.get():
        function, args = item
        try:
            function(*args)
        except BaseException:  # also that of a library that is written in Rust, which is no Exception
            log.exception("%s failed", getattr(function, "__qualname__", function))
        done[number] += 1
        del item, function, args  # they may hold the memory of a model that is no longer served


def _end(work: SimpleQueue[_Work | None], threads: int) -> None:
    for _ in range(threads):
        work.put(None)
