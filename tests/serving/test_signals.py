"""Signals that arrive in any number, at any time, in any thread."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import pytest

from serving.signals import STOP, Signals


def send(*numbers: int) -> None:
    """Send signals to this process."""
    for number in numbers:
        os.kill(os.getpid(), number)


def test_a_storm_of_one_signal_does_not_hide_another() -> None:
    """Nobody reads while they arrive, and there are more than the socket holds."""
    with Signals() as signals:
        send(*[signal.SIGHUP] * 2000, signal.SIGTERM)
        while (number := signals.wait()) == signal.SIGHUP:
            pass
    assert number == signal.SIGTERM


def test_a_signal_may_reach_any_thread() -> None:
    """While the main thread waits, and nothing else wakes it."""
    main = threading.main_thread().ident
    assert main is not None

    def send_from_here(number: int) -> None:
        waits = 0
        while waits < 100:  # in a row: it does not just pass by
            waits = waits + 1 if sys._current_frames()[main].f_code is Signals.wait.__code__ else 0
            time.sleep(0)  # gives way
        signal.pthread_kill(threading.get_ident(), number)

    with Signals() as signals:
        for number in (signal.SIGHUP, *STOP):
            sender = threading.Thread(target=send_from_here, args=(number,))
            sender.start()
            assert signals.wait() == number
            sender.join()


def test_an_action_runs_to_its_end() -> None:
    """A request to look for new versions is kept for later; an error is raised here."""

    def fail() -> None:
        raise KeyError("why")

    with Signals() as signals:
        assert signals.run(lambda: send(signal.SIGHUP, signal.SIGHUP))
        assert signals.wait() == signal.SIGHUP
        with pytest.raises(KeyError, match="why"):
            signals.run(fail)


@pytest.mark.parametrize("number", STOP)
def test_an_action_is_left_when_the_process_should_end(number: int) -> None:
    """However long it would take."""
    never = threading.Event()
    with Signals() as signals:
        send(signal.SIGHUP, number)
        assert not signals.run(never.wait)
        never.set()


def test_the_former_handlers_come_back() -> None:
    """Also the one that the first SIGTERM leaves to the system."""
    numbers = (*STOP, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with Signals() as signals:
        signals.restore_stop()
        assert [signal.getsignal(number) for number in STOP] == [signal.SIG_DFL] * 2
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.set_wakeup_fd(-1) == -1
