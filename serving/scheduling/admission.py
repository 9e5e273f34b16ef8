"""Admission control: predict the latency of a request, and refuse it at once if it cannot be answered in time.

The queue is bounded in images and in milliseconds of work. Refusing early costs nothing; computing a late response
costs as much as computing one in time. All functions are pure: they depend only on the state of the queue, the costs of
batches, and the deadline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from serving.errors import DeadlineExceeded, Overloaded, ServingError, TooLarge
from serving.runtimes.cost import CostCurve

# Safety factor on the predicted latency. Without it, a request predicted to finish exactly at its deadline is late half
# of the time, and its computation is wasted. At five times the server's capacity, 2 % of the responses took longer than
# this factor times the prediction.
SAFETY_FACTOR = 1.35


class QueueState(NamedTuple):
    """The load of a batcher when a request arrives.

    Attributes:
        queued: Images in the queue.
        ahead: Those of them that are computed before a request that arrives now.
        running: The start of each running batch, and its predicted time while nothing else shares its cores, both in
            nanoseconds.
        instances: Batches computed concurrently, each on cores of its own.
        contention: Factor by which a batch is slower because other batches share its cores.
        max_batch: Largest number of images in one batch.
        curve: Cost of a batch by its size.
        now_ns: Current time, on the clock of `running`.
    """

    queued: int
    ahead: int
    running: Sequence[tuple[int, float]]
    instances: int
    contention: float
    max_batch: int
    curve: CostCurve
    now_ns: int


class QueueLimits(NamedTuple):
    """Limits of the queue.

    Attributes:
        images: Most images that may wait.
        queue_ns: Longest queueing time, in nanoseconds.
        latency_ns: Longest predicted latency of an admitted request, in nanoseconds.
    """

    images: int
    queue_ns: float
    latency_ns: float = float("inf")


RecentRefusal = tuple[int, float, ServingError | None]
"""A refusal that for a moment also holds for later requests.

It has the time until which it holds, on the clock of `time.perf_counter_ns`; the latest deadline for which it holds;
and the error, None before the first refusal. It is a plain tuple, because every request reads it.
"""


def predict_queue_ns(state: QueueState, images: int) -> float:
    """Return the time until the computation of the first `images` queued images has begun, in nanoseconds."""
    full, remainder = divmod(images, state.max_batch)
    work = full * state.curve.ns(state.max_batch) + (state.curve.ns(remainder) if remainder else 0)
    return work / state.instances + _next_free_ns(state)


def predict_latency_ns(state: QueueState, images: int) -> float:
    """Return the time until a request of `images` further images is answered, in nanoseconds.

    The request shares its batch with the last images ahead of it, as far as they fit. If more than a batch is ahead,
    its batch counts as full, because later requests fill it. The batch shares its cores with other batches, and a
    request is answered when its whole batch is computed.
    """
    batch = max(images, min(state.ahead + images, state.max_batch))
    return predict_queue_ns(state, state.ahead + images - batch) + state.contention * state.curve.ns(batch)


def find_refusal(state: QueueState, images: int, remaining_ns: float, limits: QueueLimits) -> ServingError | None:
    """Return why a request is refused; None if it is admitted.

    Args:
        state: Load of the batcher.
        images: Images of the request.
        remaining_ns: Time until its deadline, in nanoseconds; infinity without a deadline.
        limits: Limits of the queue.
    """
    if images > limits.images:
        return TooLarge(f"the request has {images} images, more than the {limits.images} that may wait; split it")
    queue_ns = predict_queue_ns(state, state.ahead)
    retry_ms = 1 + int(queue_ns / 1e6)
    if state.queued + images > limits.images:
        return Overloaded(
            f"{state.queued} images are waiting, {images} more would exceed the {limits.images} allowed", retry_ms
        )
    if queue_ns > limits.queue_ns:
        allowed = f"{limits.queue_ns / 1e6:g} ms"
        return Overloaded(f"{queue_ns / 1e6:.0f} ms of work are waiting, more than the {allowed} allowed", retry_ms)
    if min(remaining_ns, limits.latency_ns) == float("inf"):
        return None
    latency_ns = predict_latency_ns(state, images)
    if latency_ns > limits.latency_ns:
        return Overloaded(
            f"the answer would take {latency_ns / 1e6:.0f} ms, too long for the server's latency target", retry_ms
        )
    if (compute_ns := state.curve.ns(images)) > remaining_ns:
        return DeadlineExceeded(
            f"computing takes {compute_ns / 1e6:.0f} ms, {max(0.0, remaining_ns) / 1e6:.0f} ms are left"
        )
    if SAFETY_FACTOR * latency_ns > remaining_ns:
        return Overloaded(
            f"the answer may take {SAFETY_FACTOR * latency_ns / 1e6:.0f} ms, {remaining_ns / 1e6:.0f} ms are left",
            retry_ms,
        )
    return None


def _next_free_ns(state: QueueState) -> float:
    """Return the time until an instance is free, in nanoseconds."""
    if len(state.running) < state.instances:
        return 0.0
    contention = len(state.running) / state.instances
    return max(0.0, min(start + contention * expected for start, expected in state.running) - state.now_ns)
