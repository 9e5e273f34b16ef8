"""The queue, without a batcher: the order of requests, and what it says of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import pytest

from serving.errors import Cancelled, DeadlineExceeded, InternalError
from serving.scheduling.queue import DEFAULT_PRIORITY, PRIORITIES, PROBE_PRIORITY, Entry, Outcome, RequestQueue

FOREVER = float("inf")


def make_entry(
    images: int = 1,
    arrival_ns: int = 0,
    deadline: float = FOREVER,
    priority: int = DEFAULT_PRIORITY,
    is_active: Callable[[], bool] = lambda: True,
    callback: Callable[[Outcome], None] = lambda _: None,
) -> Entry:
    """Return a request of so many images that arrived then."""
    entry = Entry(np.zeros((images, 2, 2, 3), np.uint8), deadline, is_active, callback, priority)
    entry.arrival_ns = arrival_ns
    return entry


def make_soon(arrival_ns: int) -> Entry:
    """Return a request with a deadline."""
    return make_entry(arrival_ns=arrival_ns, deadline=time.monotonic() + 100)


def fill(entries: list[Entry], patience_ns: float = 10) -> RequestQueue:
    """Return a queue of these."""
    queue = RequestQueue(patience_ns)
    for entry in entries:
        queue.push(entry)
    return queue


def empty(queue: RequestQueue) -> list[Entry]:
    """Remove all entries, and return them in order."""
    entries = []
    while entry := queue.peek():
        queue.pop(entry)
        entries.append(entry)
    assert queue.images == 0
    return entries


def draw_entries(seed: int, count: int = 30) -> list[Entry]:
    """Return requests of all kinds in order of arrival, some at the same time."""
    draw = random.Random(seed)
    now, entries = 0, []
    for _ in range(count):
        now += draw.randint(0, 3)
        deadline = draw.choice((FOREVER, time.monotonic() + 100))
        entries.append(make_entry(draw.randint(1, 4), now, deadline, draw.choice((*PRIORITIES, PROBE_PRIORITY))))
    return entries


def test_a_request_without_a_deadline_lets_others_go_first_only_while_it_is_patient() -> None:
    """Those that arrive within its patience; who arrives later, or without a deadline, waits for it."""
    patient, within, later, another = make_entry(), make_soon(9), make_soon(10), make_entry()
    assert empty(fill([patient, another, within, later])) == [within, patient, another, later]
    queue = fill([patient, another])
    assert [queue.count_ahead(entry) for entry in (within, later)] == [0, 2]


def test_patience_ends_after_a_minute() -> None:
    """However long requests may wait."""
    patient, within, later = make_entry(), make_soon(59_000_000_000), make_soon(60_000_000_000)
    assert empty(fill([patient, within, later], FOREVER)) == [within, patient, later]


def test_priorities_come_before_all_else() -> None:
    """Deadlines, patience and arrival decide among equals."""
    low, probe = make_entry(priority=3), make_entry(priority=PROBE_PRIORITY)
    high, usual = make_entry(arrival_ns=100, priority=1), make_soon(50)
    assert empty(fill([probe, low, usual, high])) == [high, usual, low, probe]
    assert [entry.is_probe for entry in (probe, low, usual, high)] == [True, False, False, False]
    assert [entry.is_patient for entry in (probe, low, usual, high)] == [True, True, False, True]


@pytest.mark.parametrize("seed", range(10))
def test_the_images_ahead_of_a_request_are_those_that_are_computed_before_it(seed: int) -> None:
    """Of those that wait when it arrives."""
    *waiting, last = draw_entries(seed)
    queue = fill(waiting)
    ahead = queue.count_ahead(last)
    queue.push(last)
    order = empty(queue)
    assert ahead == sum(len(entry.images) for entry in order[: order.index(last)])
    assert queue.count_ahead(last) == 0


@pytest.mark.parametrize("seed", range(3))
def test_requests_that_are_put_back_keep_their_places(seed: int) -> None:
    """And count again, one by one: in every line."""
    queue, same = fill(entries := draw_entries(seed)), fill(draw_entries(seed))
    images = queue.images
    taken = []
    for _ in range(12):
        first = queue.peek()
        assert first is not None
        queue.pop(first)
        taken.append(first)
    queue.restore(taken[::2] + taken[1::2])
    assert queue.images == images == sum(len(entry.images) for entry in queue)
    for priority in PRIORITIES:
        for deadline in (FOREVER, 1.0):
            late = make_entry(1, 1000, deadline, priority)
            assert queue.count_ahead(late) == same.count_ahead(late)
    assert empty(queue) == sorted(entries, key=lambda entry: entry.order)


def test_what_nobody_waits_for_is_removed_from_anywhere_in_the_queue() -> None:
    """With the reason; the others keep their places, and are all that counts."""

    def fail() -> bool:
        raise ValueError

    kept = [make_entry(2), make_entry(3, deadline=time.monotonic() + 100), make_entry(4, 0, FOREVER, 3)]
    gone, lost = make_entry(5, is_active=lambda: False), make_entry(6, priority=3, is_active=fail)
    late = make_entry(7, deadline=time.monotonic() - 1)
    queue = fill([gone, kept[0], kept[1], lost, kept[2], late])
    assert {entry: type(error) for entry, error in queue.remove_dropped()} == {
        gone: Cancelled,
        lost: InternalError,
        late: DeadlineExceeded,
    }
    assert queue.images == 2 + 3 + 4
    # After the end of all patience it waits for every image of its priority and of those above.
    assert queue.count_ahead(make_soon(1000)) == 2 + 3
    assert queue.remove_dropped() == []
    assert empty(queue) == [kept[1], kept[0], kept[2]]


def test_a_dropped_request_is_told_why() -> None:
    """In a sentence without details of the server."""

    def fail() -> bool:
        raise ValueError("secret")

    assert make_entry(deadline=time.monotonic() + 100).drop_reason() is None
    assert str(make_entry(is_active=lambda: False).drop_reason()) == "the caller went away"
    assert "deadline passed" in str(make_entry(deadline=time.monotonic() - 1).drop_reason())
    assert "secret" not in str(make_entry(is_active=fail).drop_reason())


def test_a_callback_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It stops nothing, whatever it raises."""

    class Panic(BaseException):
        """As libraries in Rust raise it."""

    def fail(_: Outcome) -> None:
        raise Panic

    make_entry(callback=fail).respond(InternalError("the engine failed"))
    assert "a response was lost" in caplog.text
