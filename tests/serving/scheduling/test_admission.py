"""Admission, without a batcher: by the state of one and a request."""

from __future__ import annotations

import pytest

from serving.errors import DeadlineExceeded, Overloaded
from serving.runtimes.cost import CostCurve
from serving.scheduling.admission import QueueLimits, QueueState, find_refusal, predict_latency_ns, predict_queue_ns

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
