"""How often a client tries again, how long it pauses, and when it gives up; on a clock of the test."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from serving.client import retries
from serving.client.retries import MAX_RETRIES, MAX_TIMEOUT_SECONDS, Patience, Retries
from serving.errors import DeadlineExceeded, InternalError, Overloaded, ServingError, Unavailable

REFUSED = Unavailable("gone")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """Holds the time in seconds in `now`."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("error", [REFUSED, Overloaded("full")])
def test_pauses_double_up_to_a_second_and_scatter_by_a_fifth(
    error: ServingError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So clients that were refused together do not come back together; the shortest and the longest are shown."""
    for end, share in ((0, 0.8), (1, 1.2)):
        monkeypatch.setattr(retries.random, "uniform", lambda *bounds, end=end: bounds[end])
        attempts = Retries(MAX_RETRIES)
        pauses = [attempts.find_pause(error) for _ in range(MAX_RETRIES)]
        assert pauses == pytest.approx([share * seconds for seconds in (0.1, 0.2, 0.4, 0.8)])
    monkeypatch.setattr(retries, "FIRST_BACKOFF_SECONDS", 0.9)
    attempts = Retries(2)
    assert [attempts.find_pause(error) for _ in range(2)] == pytest.approx([1.2 * 0.9, 1.2])


@pytest.mark.parametrize("milliseconds", [1, 1500])
def test_the_pause_that_a_server_asks_for_is_kept(milliseconds: int) -> None:
    """To the millisecond, at each retry."""
    attempts = Retries(2)
    assert [attempts.find_pause(Overloaded("full", milliseconds)) for _ in range(2)] == [milliseconds / 1000] * 2


@pytest.mark.parametrize("limit", range(MAX_RETRIES + 1))
def test_so_many_retries_in_a_row_are_allowed(limit: int) -> None:
    """Then the error itself is raised; after a success they count from 0 again."""
    attempts = Retries(limit)
    for _ in range(2):
        for _ in range(limit):
            attempts.find_pause(REFUSED)
        with pytest.raises(Unavailable) as caught:
            attempts.find_pause(REFUSED)
        assert caught.value is REFUSED
        attempts.reset()


def test_what_no_retry_helps_is_raised_at_once() -> None:
    """And a number of retries that is out of range."""
    for error in (InternalError("broken"), DeadlineExceeded("late")):
        with pytest.raises(ServingError) as caught:
            Retries(4).find_pause(error)
        assert caught.value is error
    for limit in (-1, MAX_RETRIES + 1):
        with pytest.raises(ValueError, match=f"retries must be 0 to 4, not {limit}"):
            Retries(limit)


def test_one_timeout_covers_all_answers(clock: SimpleNamespace) -> None:
    """It is that of the call too, and answers do not extend it."""
    patience = Patience(10)
    assert (patience.left, patience.call_timeout) == (10, 10)
    clock.now += 4
    patience.restart()
    assert (patience.left, patience.call_timeout) == (6, 6)
    clock.now += 7
    assert patience.left == 0


def test_a_timeout_for_each_answer_begins_again(clock: SimpleNamespace) -> None:
    """The call has none, as it may bring any number of answers."""
    patience = Patience(10, each=True)
    clock.now += 4
    assert (patience.left, patience.call_timeout) == (6, None)
    patience.restart()
    assert patience.left == 10


def test_who_waits_forever_has_no_timeout() -> None:
    """Neither for an answer, nor for a call, nor for a pause."""
    for each in (False, True):
        patience = Patience(None, each)
        patience.restart()
        assert (patience.left, patience.call_timeout, patience.check_pause(1e9)) == (None, None, 1e9)


def test_a_pause_ends_in_time(clock: SimpleNamespace) -> None:
    """Or it is not made; no pause is always in time."""
    patience = Patience(1)
    clock.now += 0.5
    assert patience.check_pause(0.25) == 0.25
    for pause in (0.5, 0.75):
        with pytest.raises(DeadlineExceeded, match=f"the server accepts no requests for {pause:.3f} s"):
            patience.check_pause(pause)
    clock.now += 1
    assert patience.check_pause(0) == 0


def test_a_timeout_is_a_number_that_can_be_waited_for() -> None:
    """Otherwise it is refused in one sentence; who gave up says after how long."""
    for timeout in (0, -1, math.nan, math.inf, 2 * MAX_TIMEOUT_SECONDS):
        with pytest.raises(ValueError, match="timeout must be a number of seconds above 0, or None"):
            Patience(timeout)
    assert Patience(MAX_TIMEOUT_SECONDS).left is not None
    assert str(Patience(0.5).give_up()) == "there was no answer for 0.5 seconds"
