"""Admission, without a batcher: what there is to do, and a request."""

from __future__ import annotations

import pytest

from serving.errors import DeadlineExceeded, Overloaded
from serving.runtimes.cost import CostCurve
from serving.scheduling.admission import QueueLimits, QueueState, answer_ns, judge, wait_ns

MS = 1_000_000
CURVE = CostCurve({1: 1 * MS, 4: 2 * MS})
FOREVER = float("inf")


def load(
    queued: int = 0, running: tuple[tuple[int, float], ...] = (), instances: int = 1, contention: float = 1
) -> QueueState:
    """Return what there is to do at the time 0, in batches of 4."""
    return QueueState(queued, queued, running, instances, contention, 4, CURVE, 0)


@pytest.mark.parametrize(
    ("state", "images", "ms"),
    [
        (load(), 0, 0),
        (load(), 4, 2),
        (load(), 9, 5),  # two full batches, and one of a single image
        (load(instances=2), 9, 2.5),
        (load(running=((-MS, 2 * MS),)), 0, 1),  # half of it is done
        (load(running=((-5 * MS, 2 * MS),)), 0, 0),  # later than expected: any time now
        (load(running=((-MS, 2 * MS),), instances=2), 0, 0),  # there is another instance
        (load(running=((0, 2 * MS), (0, 2 * MS))), 0, 4),  # two share the cores of one
    ],
)
def test_the_wait_is_what_is_under_way_and_what_is_before(state: QueueState, images: int, ms: float) -> None:
    """By the cost of full batches, over all instances."""
    assert wait_ns(state, images) == ms * MS


@pytest.mark.parametrize(
    ("state", "images", "ms"),
    [
        (load(), 1, 1),
        (load(queued=3), 1, 2),  # they fill one batch
        (load(queued=4), 1, 3),  # one image ahead of a full batch
        (load(queued=4), 4, 4),
        (load(queued=3, contention=2), 1, 4),
    ],
)
def test_an_answer_comes_with_its_batch(state: QueueState, images: int, ms: float) -> None:
    """Which is filled up by those that wait and those that come."""
    assert answer_ns(state, images) == ms * MS


@pytest.mark.parametrize(
    ("state", "images", "left_ms", "bounds", "error", "sentence"),
    [
        (load(queued=8), 1, FOREVER, QueueLimits(9, FOREVER), None, ""),
        (
            load(queued=8),
            2,
            FOREVER,
            QueueLimits(9, FOREVER),
            Overloaded,
            "8 images are waiting, 2 more would exceed the 9",
        ),
        (load(queued=8), 1, FOREVER, QueueLimits(9, 4 * MS), None, ""),
        (
            load(queued=8),
            1,
            FOREVER,
            QueueLimits(9, 3 * MS),
            Overloaded,
            "4 ms of work are waiting, more than the 3 ms",
        ),
        (load(queued=3), 1, 2.8, QueueLimits(9, FOREVER), None, ""),
        (load(queued=3), 1, 2.6, QueueLimits(9, FOREVER), Overloaded, "the answer may take 3 ms, 3 ms are left"),
        (load(queued=3), 1, 0.9, QueueLimits(9, FOREVER), DeadlineExceeded, "to compute takes 1 ms, 1 ms are left"),
        (load(queued=3), 1, -5, QueueLimits(9, FOREVER), DeadlineExceeded, "to compute takes 1 ms, 0 ms are left"),
        (load(queued=3), 1, FOREVER, QueueLimits(9, FOREVER, 2 * MS), None, ""),
        (
            load(queued=3),
            1,
            FOREVER,
            QueueLimits(9, FOREVER, MS),
            Overloaded,
            "too long for the server's latency target",
        ),
    ],
)
def test_what_keeps_a_request_out(
    state: QueueState, images: int, left_ms: float, bounds: QueueLimits, error: type[Exception] | None, sentence: str
) -> None:
    """Images, work, the goal, the deadline; with a safety factor on what is expected."""
    refusal = judge(state, images, left_ms * MS, bounds)
    assert type(refusal) is (error or type(None))
    assert sentence in str(refusal or "")


def test_a_refusal_says_when_to_try_again() -> None:
    """When the work that waits will be done."""
    refusal = judge(load(queued=8, running=((0, 2 * MS),)), 1, FOREVER, QueueLimits(8, FOREVER))
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_ms == 1 + 6


def test_whoever_goes_before_others_waits_for_fewer() -> None:
    """Of 100 images that wait, none is before it."""
    contention = load(queued=100)
    assert isinstance(judge(contention, 1, 20 * MS, QueueLimits(1000, FOREVER)), Overloaded)
    assert judge(contention._replace(before=0), 1, 20 * MS, QueueLimits(1000, FOREVER)) is None
