"""Admission, without a batcher: by the state of one and a request."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest

from serving.errors import DeadlineExceeded, Overloaded, TooLarge
from serving.runtimes.cost import CostCurve
from serving.scheduling.admission import (
    MAX_TRIAL_INTERVAL_NS,
    REFUSAL_TTL_NS,
    TRIAL_INTERVAL,
    Admission,
    QueueLimits,
    QueueState,
    find_refusal,
    predict_latency_ns,
    predict_queue_ns,
)
from serving.scheduling.latency_target import LatencyTarget
from serving.scheduling.queue import Entry

MS = 1_000_000
CURVE = CostCurve({1: 1 * MS, 4: 2 * MS})
FOREVER = float("inf")


def make_state(
    queued: int = 0, running: tuple[tuple[int, float], ...] = (), instances: int = 1, contention: float = 1
) -> QueueState:
    """Return the state of a batcher at the time 0, with batches of 4."""
    return QueueState(queued, queued, running, instances, contention, 4, CURVE, 0)


@pytest.mark.parametrize(
    ("state", "images", "ms"),
    [
        (make_state(), 0, 0),
        (make_state(), 4, 2),
        (make_state(), 9, 5),  # two full batches, and one of a single image
        (make_state(instances=2), 9, 2.5),
        (make_state(running=((-MS, 2 * MS),)), 0, 1),  # half of it is done
        (make_state(running=((-5 * MS, 2 * MS),)), 0, 0),  # later than expected: any time now
        (make_state(running=((-MS, 2 * MS),), instances=2), 0, 0),  # there is another instance
        (make_state(running=((0, 2 * MS), (0, 2 * MS))), 0, 4),  # two share the cores of one
        (make_state(running=((0, 2 * MS),) * 4, instances=2), 0, 4),  # and four those of two
    ],
)
def test_the_wait_is_what_is_under_way_and_what_is_before(state: QueueState, images: int, ms: float) -> None:
    """By the cost of full batches, over all instances."""
    assert predict_queue_ns(state, images) == ms * MS


@pytest.mark.parametrize(
    ("state", "images", "ms"),
    [
        (make_state(), 1, 1),
        (make_state(queued=3), 1, 2),  # they fill one batch
        (make_state(queued=4), 1, 3),  # one image ahead of a full batch
        (make_state(queued=4), 4, 4),
        (make_state(queued=3, contention=2), 1, 4),
    ],
)
def test_an_answer_comes_with_its_batch(state: QueueState, images: int, ms: float) -> None:
    """Which is filled up by those that wait and those that come."""
    assert predict_latency_ns(state, images) == ms * MS


@pytest.mark.parametrize(
    ("state", "images", "remaining_ms", "limits", "error", "sentence"),
    [
        (make_state(queued=8), 1, FOREVER, QueueLimits(9, FOREVER), None, ""),
        (
            make_state(queued=8),
            2,
            FOREVER,
            QueueLimits(9, FOREVER),
            Overloaded,
            "8 images are waiting, 2 more would exceed the 9",
        ),
        (make_state(queued=8), 1, FOREVER, QueueLimits(9, 4 * MS), None, ""),
        (
            make_state(queued=8),
            1,
            FOREVER,
            QueueLimits(9, 3 * MS),
            Overloaded,
            "4 ms of work are waiting, more than the 3 ms",
        ),
        (make_state(queued=3), 1, 2.8, QueueLimits(9, FOREVER), None, ""),
        (make_state(queued=3), 1, 2.6, QueueLimits(9, FOREVER), Overloaded, "the answer may take 3 ms, 3 ms are left"),
        (
            make_state(queued=3),
            1,
            0.9,
            QueueLimits(9, FOREVER),
            DeadlineExceeded,
            "computing takes 1 ms, 1 ms are left",
        ),
        (make_state(queued=3), 1, -5, QueueLimits(9, FOREVER), DeadlineExceeded, "computing takes 1 ms, 0 ms are left"),
        (make_state(queued=3), 1, FOREVER, QueueLimits(9, FOREVER, 2 * MS), None, ""),
        (
            make_state(queued=3),
            1,
            FOREVER,
            QueueLimits(9, FOREVER, MS),
            Overloaded,
            "too long for the server's latency target",
        ),
    ],
)
def test_what_keeps_a_request_out(
    state: QueueState,
    images: int,
    remaining_ms: float,
    limits: QueueLimits,
    error: type[Exception] | None,
    sentence: str,
) -> None:
    """Images, work, the latency target, the deadline; with a safety factor on the predicted latency."""
    refusal = find_refusal(state, images, remaining_ms * MS, limits)
    assert type(refusal) is (error or type(None))
    assert sentence in str(refusal or "")


def test_a_refusal_says_when_to_try_again() -> None:
    """When the work that waits will be done."""
    refusal = find_refusal(make_state(queued=8, running=((0, 2 * MS),)), 1, FOREVER, QueueLimits(8, FOREVER))
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_ms == 1 + 6


def test_whoever_goes_before_others_waits_for_fewer() -> None:
    """Of 100 images that wait, none is before it."""
    state = make_state(queued=100)
    assert isinstance(find_refusal(state, 1, 20 * MS, QueueLimits(1000, FOREVER)), Overloaded)
    assert find_refusal(state._replace(ahead=0), 1, 20 * MS, QueueLimits(1000, FOREVER)) is None


@pytest.mark.parametrize(
    ("remaining_ms", "limits", "sentence"),
    [
        (FOREVER, QueueLimits(9, FOREVER), "10 images, more than the 9 that may wait"),
        (FOREVER, QueueLimits(100, 4e13), "80000000 ms of work are waiting, more than the 4e+07 ms allowed"),
        (FOREVER, QueueLimits(100, FOREVER, 5e13), "the answer would take 110000000 ms, too long"),
        (15_000_000, QueueLimits(100, FOREVER), "computing takes 30000000 ms, 15000000 ms are left"),
        (140_000_000, QueueLimits(100, FOREVER), "the answer may take 148500000 ms, 140000000 ms are left"),
    ],
)
def test_a_refusal_says_how_long_it_would_take(remaining_ms: float, limits: QueueLimits, sentence: str) -> None:
    """In whole milliseconds, all digits of them; and when to try again, if that helps."""
    curve = CostCurve({1: 1e13, 4: 2e13})
    state = make_state(queued=12, running=((0, 2e13),))._replace(curve=curve)
    images = 10 if limits.images == 9 else 6
    refusal = find_refusal(state, images, remaining_ms * MS, limits)
    assert sentence in str(refusal)
    if isinstance(refusal, Overloaded):
        assert refusal.retry_ms == 1 + 80_000_000


def test_what_just_meets_a_limit_is_admitted() -> None:
    """Each limit is the most that is allowed."""
    state = make_state(queued=4)
    for limits in (QueueLimits(5, FOREVER), QueueLimits(9, 2 * MS), QueueLimits(9, FOREVER, 3 * MS)):
        assert find_refusal(state, 1, FOREVER, limits) is None
    assert find_refusal(make_state(), 9, FOREVER, QueueLimits(9, FOREVER)) is None
    assert isinstance(find_refusal(make_state(), 10, FOREVER, QueueLimits(9, FOREVER)), TooLarge)


@dataclass
class StillClock:
    """The clocks of the process, which stand still."""

    ns: int = 1_000_000_000_000

    def deadline(self, ms: float) -> float:
        """Return a deadline that much later."""
        return (self.ns + ms * MS) / 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StillClock:
    """The time is that of the test."""
    clock = StillClock()
    monkeypatch.setattr(time, "perf_counter_ns", lambda: clock.ns)
    monkeypatch.setattr(time, "monotonic", lambda: clock.ns / 1e9)
    return clock


def make_entry(deadline: float = FOREVER, images: int = 1, priority: int = 2) -> Entry:
    """Return a request that arrives now."""
    return Entry(np.zeros((images, 2, 2, 3), np.uint8), deadline, lambda: True, lambda _: None, priority)


def make_busy(clock: StillClock) -> QueueState:
    """Return the state of a batcher in which 8 images wait, and a full batch begins now."""
    return make_state(queued=8, running=((clock.ns, 2 * MS),))._replace(now_ns=clock.ns)


def test_a_refusal_holds_for_whoever_has_no_more_time(clock: StillClock) -> None:
    """Not for those with more, nor for those without a deadline; for a millisecond."""
    admission = Admission(QueueLimits(100, FOREVER), None)
    assert admission.recall_refusal(0) is None
    refusal = admission.find_refusal(make_entry(clock.deadline(5)), make_busy(clock))
    assert isinstance(refusal, Overloaded)
    for ms in (-1, 1, 5, 6):
        recalled = admission.recall_refusal(clock.deadline(ms))
        assert recalled is not refusal
        assert str(recalled) == str(refusal)
    assert admission.recall_refusal(clock.deadline(6.1)) is None
    assert admission.recall_refusal(FOREVER) is None
    clock.ns += REFUSAL_TTL_NS - 1
    assert admission.recall_refusal(0)
    clock.ns += 1
    assert admission.recall_refusal(0) is None


def test_a_refusal_of_one_without_a_deadline_holds_for_its_like(clock: StillClock) -> None:
    """Until it is forgotten; who has a deadline goes first, and may be admitted."""
    admission = Admission(QueueLimits(8, FOREVER), None)
    assert admission.find_refusal(make_entry(), make_busy(clock))
    assert admission.recall_refusal(FOREVER)
    assert admission.recall_refusal(clock.deadline(1e6)) is None
    admission.forget_refusal()
    assert admission.recall_refusal(FOREVER) is None


def test_a_refusal_that_may_not_be_right_for_others_is_forgotten(clock: StillClock) -> None:
    """Of many images; and of one image, as soon as any request has had a priority of its own."""
    limits = QueueLimits(9, FOREVER)
    admission, busy = Admission(limits, None), make_busy(clock)
    assert admission.find_refusal(make_entry(images=2), busy)
    assert admission.recall_refusal(FOREVER) is None
    assert admission.find_refusal(make_entry(priority=1), busy) is None
    busy = busy._replace(ahead=9)
    for priority in (2, 1, 2):
        assert admission.find_refusal(make_entry(priority=priority), busy)
        assert admission.recall_refusal(FOREVER) is None


def test_a_latency_target_limits_whatever_has_no_deadline(clock: StillClock) -> None:
    """It is that of the moment, not that of the start."""
    target = LatencyTarget(20, CURVE)
    admission = Admission(QueueLimits(100, FOREVER), target)
    assert admission.find_refusal(make_entry(), make_busy(clock)) is None
    target.limit_ns = 5 * MS
    assert "latency target" in str(admission.find_refusal(make_entry(), make_busy(clock)))


def test_a_request_whose_size_costs_too_much_is_tried_for_a_tenth_of_the_time(clock: StillClock) -> None:
    """The first time it is refused; later it is computed once in ten times its cost, if it may wait at all."""
    curve = CostCurve({1: 1.0, 4: 100 * MS})
    admission = Admission(QueueLimits(8, FOREVER), None)

    def refuses(queued: int = 0, ms: float = 10, images: int = 4) -> bool:
        state = make_state(queued)._replace(now_ns=clock.ns, curve=curve)
        return admission.find_refusal(make_entry(clock.deadline(ms), images), state) is not None

    cost_ns = 135 * MS  # with the safety factor
    assert refuses()
    clock.ns += TRIAL_INTERVAL * cost_ns - 1
    assert refuses()
    clock.ns += 1
    assert refuses(queued=5)  # more than may wait
    assert refuses(ms=0)  # no time at all
    assert not refuses()
    assert refuses()
    clock.ns += TRIAL_INTERVAL * cost_ns
    assert not refuses()


def test_a_request_that_costs_hours_is_tried_every_minute(clock: StillClock) -> None:
    """Else a cost that is wrong by so much would be so for days."""
    state = make_state()._replace(curve=CostCurve({1: 3600e9}))
    admission = Admission(QueueLimits(8, FOREVER), None)
    refusals = []
    for _ in range(3):
        entry = make_entry(clock.deadline(10))
        refusals.append(admission.find_refusal(entry, state._replace(now_ns=clock.ns)) is not None)
        clock.ns += int(MAX_TRIAL_INTERVAL_NS)
    assert refusals == [True, False, False]
