"""Waiting requests, in the order in which they are computed, and their results.

The order is that of priorities, and within a priority that of arrival, with one exception: a request without a deadline
lets those with a deadline go first that arrive up to `patience_ns` later. So callers without a deadline do not keep out
those who have little time, and wait for them only so long. Nothing that arrives later goes before a request with a
deadline, so that its latency can be predicted.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from serving.errors import Cancelled, DeadlineExceeded, InternalError, ServingError
from serving.runtimes.base import Images, Probabilities

PRIORITIES, DEFAULT_PRIORITY = (1, 2, 3), 2  # 1 is computed first
PROBE_PRIORITY = 4  # of the server's own requests
MAX_PATIENCE_NS = 60e9

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
        images: uint8 [n, height, width, channels], at least one image.
        deadline: When the result becomes useless, in seconds on the clock of `time.monotonic`.
        is_active: Returns whether the caller still waits; called just before the computation.
        callback: Called once, with the outcome.
        priority: One of `PRIORITIES`, or `PROBE_PRIORITY`.
        arrival_ns: Time of arrival, on the clock of `time.perf_counter_ns`.
        is_patient: Whether it has no deadline.
        is_probe: Whether it is a request of the server's own.
        order: Place in the queue: a request with a smaller one is computed first.
    """

    __slots__ = (
        "arrival_ns",
        "callback",
        "deadline",
        "images",
        "is_active",
        "is_patient",
        "is_probe",
        "order",
        "priority",
    )

    def __init__(
        self,
        images: Images,
        deadline: float,
        is_active: Callable[[], bool],
        callback: Callable[[Outcome], None],
        priority: int = DEFAULT_PRIORITY,
    ) -> None:
        self.images, self.deadline, self.is_active, self.callback = images, deadline, is_active, callback
        self.priority, self.arrival_ns = priority, time.perf_counter_ns()
        self.is_patient, self.is_probe = deadline == float("inf"), priority == PROBE_PRIORITY
        self.order: tuple[int, float, int]

    def respond(self, outcome: Outcome) -> None:
        """Call the callback; if that fails, the error is logged, and other requests and the worker are not affected."""
        try:
            self.callback(outcome)
        except BaseException:  # also that of a library that is written in Rust, which is no Exception
            log.exception("a response was lost: its callback failed")

    def drop_reason(self) -> ServingError | None:
        """Return why this request need not be computed; None if its caller still waits."""
        try:
            if not self.is_active():
                return Cancelled("the caller went away")
        except Exception:
            log.exception("a request is dropped: nothing tells whether its caller still waits")
            return InternalError("the server failed on this request; its log has the details")
        if time.monotonic() > self.deadline:
            return DeadlineExceeded("the deadline passed while the request was waiting")
        return None


class RequestQueue:
    """The waiting requests, in order: see the module. Its user holds a lock.

    Attributes:
        images: Number of all waiting images.
    """

    def __init__(self, patience_ns: float) -> None:
        """Begin empty.

        Args:
            patience_ns: For how long at most requests with a deadline go before those without that arrived earlier.
        """
        self.images = 0
        self._patience_ns = min(patience_ns, MAX_PATIENCE_NS)
        self._numbers = itertools.count()
        # By priority, and whether they have no deadline: in each of these, the order is that of arrival.
        self._lines: dict[tuple[int, bool], _Line] = {}

    def __iter__(self) -> Iterator[Entry]:
        """Yield all entries, in no particular order."""
        return itertools.chain.from_iterable(self._lines.values())

    def push(self, entry: Entry) -> None:
        """Add an entry."""
        due_ns = entry.arrival_ns + self._patience_ns if entry.is_patient else entry.arrival_ns
        entry.order = entry.priority, due_ns, next(self._numbers)
        key = entry.priority, entry.is_patient
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line()
        line.append(entry)
        line.images += len(entry.images)
        self.images += len(entry.images)

    def peek(self) -> Entry | None:
        """Return the first entry."""
        first: Entry | None = None
        if not self.images:
            return first
        for line in self._lines.values():
            if line and (first is None or line[0].order < first.order):
                first = line[0]
        return first

    def pop(self, entry: Entry) -> None:
        """Remove the first entry."""
        line = self._lines[entry.priority, entry.is_patient]
        line.popleft()
        line.images -= len(entry.images)
        self.images -= len(entry.images)

    def restore(self, entries: Iterable[Entry]) -> None:
        """Put entries back that were the first ones."""
        for entry in sorted(entries, key=_get_order, reverse=True):
            line = self._lines[entry.priority, entry.is_patient]
            line.appendleft(entry)
            line.images += len(entry.images)
            self.images += len(entry.images)

    def count_ahead(self, entry: Entry) -> int:
        """Return the number of waiting images that are computed before those of an entry that is pushed now."""
        ahead = self.images
        for (priority, is_patient), line in self._lines.items():
            if priority > entry.priority:
                ahead -= line.images
            elif priority == entry.priority and is_patient and not entry.is_patient:
                ahead -= line.images
                due = itertools.takewhile(lambda other: other.order[1] <= entry.arrival_ns, line)
                ahead += sum(len(other.images) for other in due)
        return ahead

    def remove_dropped(self) -> list[tuple[Entry, ServingError]]:
        """Remove all entries that need not be computed, and return them with the reasons."""
        dropped: list[tuple[Entry, ServingError]] = []
        for line in self._lines.values():
            reasons = [(entry, entry.drop_reason()) for entry in line]
            dropped += [(entry, error) for entry, error in reasons if error]
            line.clear()
            line.extend(entry for entry, error in reasons if not error)
            line.images = sum(len(entry.images) for entry in line)
        self.images -= sum(len(entry.images) for entry, _ in dropped)
        return dropped


class _Line(deque[Entry]):
    """Entries in order of arrival, and the number of their images."""

    images = 0


def _get_order(entry: Entry) -> tuple[int, float, int]:
    return entry.order
