"""What waits for the engine, what is computed at once, and what becomes of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from serving.errors import Cancelled, DeadlineExceeded, ServingError
from serving.runtimes.base import Gather, Images, Probabilities

PRIORITIES, DEFAULT_PRIORITY = (1, 2, 3), 2  # 1 comes first

log = logging.getLogger(__name__)


class BatchResult(NamedTuple):
    """What became of one request's images.

    Attributes:
        probabilities: float32 [images, classes].
        queue_ns: Time from arrival to the start of the batch, in nanoseconds.
        compute_ns: Time to compute the batch, in nanoseconds.
        batch_size: Images in the batch, those of other requests included.
    """

    probabilities: Probabilities
    queue_ns: int
    compute_ns: int
    batch_size: int


Outcome = BatchResult | ServingError


class Job:
    """One waiting request.

    Attributes:
        images: uint8 [n, height, width, 3], at least one.
        deadline: Time on `time.monotonic`'s clock, in seconds, after which the answer is of no use.
        alive: Says whether the caller still waits; asked just before the computation.
        done: Takes what becomes of it.
        arrived: When it came, on the clock of `time.perf_counter_ns`.
    """

    __slots__ = ("alive", "arrived", "deadline", "done", "images")

    def __init__(
        self, images: Images, deadline: float, alive: Callable[[], bool], done: Callable[[Outcome], None]
    ) -> None:
        self.images, self.deadline, self.alive, self.done = images, deadline, alive, done
        self.arrived = time.perf_counter_ns()

    def tell(self, outcome: Outcome) -> None:
        """Hand the outcome over; who fails to take it harms no other request, nor the thread that leads."""
        try:
            self.done(outcome)
        except Exception:
            log.exception("an answer was lost")

    def refusal(self) -> ServingError | None:
        """Say why there is no use in computing this job, if so."""
        if not self.alive():
            return Cancelled("the caller went away")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded("the deadline passed while the request was waiting")
        return None


Queued = tuple[int, int, Job]
"""One of the heap of those that wait: its priority, its number in the order of arrival, and the request."""


@dataclass(eq=False)
class Batch:
    """What was taken from the queue at once.

    Attributes:
        jobs: What is computed.
        refused: What is not, and why.
        size: Images to compute.
        entries: What was taken from the queue, for the one and the other.
        gathered: The images put together, if that was begun ahead.
        expected_ns: What computing them is expected to take while nothing else shares the cores.
        began: When that began, on the clock of `time.perf_counter_ns`.
        overflow: Whether others were under way, on every instance: it is computed by a part of the cores.
    """

    jobs: list[Job] = field(default_factory=list)
    refused: list[tuple[Job, ServingError]] = field(default_factory=list)
    size: int = 0
    entries: list[Queued] = field(default_factory=list)
    gathered: Future[Images] | None = None
    expected_ns: float = 0.0
    began: int = 0
    overflow: bool = False

    @property
    def taken(self) -> int:
        """Images that were taken from the queue."""
        return sum(len(job.images) for _, _, job in self.entries)


class ThreadPool(ThreadPoolExecutor):
    """Threads of no special kind."""

    ahead = False

    def gatherer(self) -> Gather:
        """Return what puts images together in memory of their own."""
        return np.concatenate
