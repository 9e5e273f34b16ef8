"""Admission control: predict the latency of a request, and refuse it at once if it cannot be answered in time.

The queue is bounded in images and in milliseconds of work. Refusing early costs nothing; computing a late response
costs as much as computing one in time. All functions are pure: they depend only on the state of the queue, the costs of
batches, and the deadline. `Admission` adds what later requests need to know of earlier ones.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

from serving.errors import DeadlineExceeded, Overloaded, ServingError, TooLarge
from serving.runtimes.cost import CostCurve
from serving.scheduling.latency_target import LatencyTarget
from serving.scheduling.queue import DEFAULT_PRIORITY, Entry

# Safety factor on the predicted latency. Without it, a request predicted to finish exactly at its deadline is late half
# of the time, and its computation is wasted. At five times the server's capacity, 2 % of the responses took longer than
# this factor times the prediction.
SAFETY_FACTOR = 1.35
REFUSAL_TTL_NS = 1_000_000  # how long a refusal also holds for later requests
# A size that costs too much for all its requests is never computed, and its cost never corrected. So now and then one
# is computed in spite of its cost, for a tenth of the time at most, unless it costs many seconds.
TRIAL_INTERVAL, MAX_TRIAL_INTERVAL_NS = 10, 60e9  # times the predicted cost
NO_REFUSAL = 0, 0.0, 0.0, None


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
        images: Most images that may wait before a request, it included.
        queue_ns: Longest queueing time, in nanoseconds.
        latency_ns: Longest predicted latency of an admitted request, in nanoseconds.
    """

    images: int
    queue_ns: float
    latency_ns: float = float("inf")


def predict_queue_ns(state: QueueState, images: int) -> float:
    """Return the time until the computation of the first `images` queued images has begun, in nanoseconds."""
    full, remainder = divmod(images, state.max_batch)
    work = full * state.curve.ns(state.max_batch) + (state.curve.ns(remainder) if remainder else 0)
    return work / state.instances + _next_free_ns(state)


def predict_latency_ns(state: QueueState, images: int) -> float:
    """Return the time until a request of `images` further images is answered, in nanoseconds.

    The request shares its batch with the last images ahead of it and those that wait behind it, as far as they fit. If
    more than a batch waits, its batch counts as full, because later requests fill it. The batch shares its cores with
    other batches, and a request is answered when its whole batch is computed.
    """
    batch = max(images, min(state.queued + images, state.max_batch))
    queue_ns = predict_queue_ns(state, max(0, state.ahead + images - batch))
    return queue_ns + state.contention * state.curve.ns(batch)


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
    if state.ahead + images > limits.images:
        return Overloaded(
            f"{state.ahead} images are waiting, {images} more would exceed the {limits.images} allowed", retry_ms
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


class Admission:
    """Decides on the requests of a batcher, whose lock is held, and remembers its refusals.

    Attributes:
        limits: Limits of the queue.
        has_priorities: Whether a request had another priority than usual: a refusal may not hold for others.
    """

    def __init__(self, limits: QueueLimits, target: LatencyTarget | None) -> None:
        """Admit within `limits`, and what meets a target, if there is one."""
        self.limits, self._target = limits, target
        # One tuple, because every request reads it without the lock: the time until which it holds, the earliest and
        # the latest deadline for which it holds, and the error.
        self._recent: tuple[int, float, float, ServingError | None] = NO_REFUSAL
        self.has_priorities = False
        self._next_trial_ns = 0

    def find_refusal(self, entry: Entry, state: QueueState) -> ServingError | None:
        """Return why a request is refused; None if it is admitted."""
        images, deadline = len(entry.images), entry.deadline
        self.has_priorities = self.has_priorities or entry.priority != DEFAULT_PRIORITY
        remaining_ns = (deadline - time.monotonic()) * 1e9
        limits = self.limits._replace(latency_ns=self._target.limit_ns) if self._target else self.limits
        refusal = find_refusal(state, images, remaining_ns, limits)
        if refusal and self._is_trial(state, images, min(remaining_ns, limits.latency_ns)):
            return None
        if refusal and images == 1 and not self.has_priorities:
            # Those without a deadline stand behind those with one, who may be admitted.
            earliest, latest = (deadline, deadline) if entry.is_patient else (0.0, deadline + REFUSAL_TTL_NS / 1e9)
            # A copy, because the error that is raised will carry the id of its own call.
            self._recent = state.now_ns + REFUSAL_TTL_NS, earliest, latest, copy.copy(refusal)
        return refusal

    def recall_refusal(self, deadline: float) -> ServingError | None:
        """Return the error of a recent refusal that also holds for a request with this deadline; None without one."""
        expires_ns, earliest, latest, error = self._recent
        return error if error and earliest <= deadline <= latest and time.perf_counter_ns() < expires_ns else None

    def forget_refusal(self) -> None:
        """Let the recent refusal hold for no further request."""
        self._recent = NO_REFUSAL

    def _is_trial(self, state: QueueState, images: int, allowed_ns: float) -> bool:
        """Return whether a request is computed although its size alone costs too much."""
        cost_ns = SAFETY_FACTOR * state.curve.ns(images)
        if not 0 < allowed_ns < cost_ns or state.ahead + images > self.limits.images:
            return False
        is_first, is_due = not self._next_trial_ns, state.now_ns >= self._next_trial_ns
        if is_first or is_due:
            self._next_trial_ns = state.now_ns + int(min(TRIAL_INTERVAL * cost_ns, MAX_TRIAL_INTERVAL_NS))
        return is_due and not is_first
