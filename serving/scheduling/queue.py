"""What the batcher schedules: waiting requests, the batches formed of them, and their results."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from serving.errors import Cancelled, DeadlineExceeded, ServingError
from serving.runtimes.base import Images, Probabilities

PRIORITIES, DEFAULT_PRIORITY = (1, 2, 3), 2  # 1 is computed first

log = logging.getLogger(__name__)


class BatchResult(NamedTuple):
    """The result for the images of one request.

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


class Entry:
    """One request in the queue.

    Attributes:
        images: uint8 [n, height, width, 3], at least one image.
        deadline: When the result becomes useless, in seconds on the clock of `time.monotonic`.
        is_active: Returns whether the caller still waits; called just before the computation.
        callback: Called once, with the outcome.
        arrival_ns: Time of arrival, on the clock of `time.perf_counter_ns`.
    """

    __slots__ = ("arrival_ns", "callback", "deadline", "images", "is_active")

    def __init__(
        self, images: Images, deadline: float, is_active: Callable[[], bool], callback: Callable[[Outcome], None]
    ) -> None:
        self.images, self.deadline, self.is_active, self.callback = images, deadline, is_active, callback
        self.arrival_ns = time.perf_counter_ns()

    def respond(self, outcome: Outcome) -> None:
        """Call the callback; if that fails, the error is logged, and other requests and the worker are not affected."""
        try:
            self.callback(outcome)
        except Exception:
            log.exception("a response was lost: its callback failed")

    def drop_reason(self) -> ServingError | None:
        """Return why this request need not be computed; None if its caller still waits."""
        if not self.is_active():
            return Cancelled("the caller went away")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded("the deadline passed while the request was waiting")
        return None


HeapItem = tuple[int, int, Entry]
"""An item of the queue's heap: priority, sequence number, request."""


@dataclass(eq=False)
class Batch:
    """Requests that were removed from the queue together.

    Attributes:
        entries: Requests to compute.
        dropped: Requests that are not computed, each with the reason.
        size: Images to compute.
        items: The heap items of `entries` and `dropped`.
        concatenated: The images of all entries, if the batch was prefetched.
        expected_ns: Predicted time to compute the batch while nothing else shares its cores, in nanoseconds.
        start_ns: Start of the computation, on the clock of `time.perf_counter_ns`.
        is_overflow: Whether every instance was busy at the start, so that the batch has only a part of the cores.
    """

    entries: list[Entry] = field(default_factory=list)
    dropped: list[tuple[Entry, ServingError]] = field(default_factory=list)
    size: int = 0
    items: list[HeapItem] = field(default_factory=list)
    concatenated: Future[Images] | None = None
    expected_ns: float = 0.0
    start_ns: int = 0
    is_overflow: bool = False

    @property
    def removed_images(self) -> int:
        """Images that were removed from the queue: those of `entries` and `dropped`."""
        return sum(len(entry.images) for _, _, entry in self.items)
