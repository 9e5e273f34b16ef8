"""Whether a request is let in: by what waits, what runs, what that costs, and when its caller stops waiting.

The queue is bounded in images and in milliseconds of work, and a request that could not be answered in time is refused
at once: that costs nothing, where a late answer costs as much as one in time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serving.errors import DeadlineExceeded, Overloaded, ServingError
from serving.runtimes.cost import CostCurve

# What is expected to take all the time that is left is late half of the time, and was computed for nothing. Under five
# times the load that a server bears, 2 % of the answers took longer than this times what was expected.
HURRY = 1.35


class QueueState(NamedTuple):
    """What a batcher has to do when a request comes.

    Attributes:
        queued: Images that wait.
        before: Of these, those that go before a request that comes now.
        running: Of each batch that is computed, when that began and what it was expected to take while nothing else
            shared the cores, in nanoseconds.
        instances: Batches that are computed at a time, each with cores of its own.
        contention: How many times as long a batch takes for those that share the cores with it.
        limit: Images that may share a batch.
        curve: What batches cost.
        now: The time, on the clock of `running`.
    """

    queued: int
    before: int
    running: Sequence[tuple[int, float]]
    instances: int
    contention: float
    limit: int
    curve: CostCurve
    now: int


class QueueLimits(NamedTuple):
    """How much may wait.

    Attributes:
        images: At most so many.
        queue_ns: At most so much work, in nanoseconds.
        answer_ns: What would take longer to answer is not let in.
    """

    images: int
    queue_ns: float
    answer_ns: float = float("inf")


def wait_ns(load: QueueState, images: int) -> float:
    """Return when so many of the images that wait will have begun, in nanoseconds from now."""
    full, rest = divmod(images, load.limit)
    waiting = full * load.curve.ns(load.limit) + (load.curve.ns(rest) if rest else 0)
    return waiting / load.instances + _free_ns(load)


def answer_ns(load: QueueState, images: int) -> float:
    """Return how long the answer to so many further images will take, in nanoseconds.

    Their batch begins after all that waits before it. Those that come later fill it up, and batches share the cores
    with others: nobody's answer is there before the whole batch is.
    """
    batch = max(images, min(load.before + images, load.limit))
    return wait_ns(load, load.before + images - batch) + load.contention * load.curve.ns(batch)


def judge(load: QueueState, images: int, left_ns: float, bounds: QueueLimits) -> ServingError | None:
    """Return why a request is not let in; None if it is.

    Args:
        load: What there is to do.
        images: Of the request.
        left_ns: How long its caller still waits, in nanoseconds; infinity is for ever.
        bounds: How much may wait.
    """
    waits = wait_ns(load, load.before)
    retry_ms = 1 + int(waits / 1e6)
    if load.queued + images > bounds.images:
        return Overloaded(
            f"{load.queued} images are waiting, {images} more would exceed the {bounds.images} allowed", retry_ms
        )
    if waits > bounds.queue_ns:
        allowed = f"{bounds.queue_ns / 1e6:g} ms"
        return Overloaded(f"{waits / 1e6:.0f} ms of work are waiting, more than the {allowed} allowed", retry_ms)
    if min(left_ns, bounds.answer_ns) == float("inf"):
        return None
    takes = answer_ns(load, images)
    if takes > bounds.answer_ns:
        return Overloaded(
            f"the answer would take {takes / 1e6:.0f} ms, too long for the server's latency target", retry_ms
        )
    if (own := load.curve.ns(images)) > left_ns:
        return DeadlineExceeded(f"to compute takes {own / 1e6:.0f} ms, {max(0.0, left_ns) / 1e6:.0f} ms are left")
    if HURRY * takes > left_ns:
        return Overloaded(
            f"the answer may take {HURRY * takes / 1e6:.0f} ms, {left_ns / 1e6:.0f} ms are left", retry_ms
        )
    return None


def _free_ns(load: QueueState) -> float:
    """Return when the next of the batches under way will make room for another, in nanoseconds from now."""
    if len(load.running) < load.instances:
        return 0.0
    contention = len(load.running) / load.instances
    return max(0.0, min(began + contention * expected for began, expected in load.running) - load.now)
