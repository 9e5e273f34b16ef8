"""Batches: requests that are computed together."""

from __future__ import annotations

import logging
from concurrent.futures import Future
from dataclasses import dataclass, field

from serving.errors import InternalError, ServingError
from serving.runtimes.base import Concatenator, Images, Probabilities
from serving.scheduling.queue import BatchResult, Entry
from serving.threads import WorkerPool

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Batch:
    """Requests that were removed from the queue together.

    Attributes:
        entries: Requests to compute.
        dropped: Requests that are not computed, each with the reason.
        size: Images to compute.
        removed_images: Images that were removed from the queue: those to compute and the dropped ones.
        is_probe: Whether it is a request of the server's own, which nothing counts.
        concatenated: The images of all entries, if the batch was prefetched.
        expected_ns: Predicted time to compute the batch while nothing else shares its cores, in nanoseconds.
        start_ns: Start of the computation, on the clock of `time.perf_counter_ns`.
        is_overflow: Whether every instance was busy at the start, so that the batch has only a part of the cores.
    """

    entries: list[Entry] = field(default_factory=list)
    dropped: list[tuple[Entry, ServingError]] = field(default_factory=list)
    size: int = 0
    removed_images: int = 0
    is_probe: bool = False
    concatenated: Future[Images] | None = None
    expected_ns: float = 0.0
    start_ns: int = 0
    is_overflow: bool = False

    @property
    def removed(self) -> list[Entry]:
        """The entries that were removed from the queue: those to compute and the dropped ones."""
        return [*self.entries, *(entry for entry, _ in self.dropped)]

    def is_stale(self, first: Entry | None) -> bool:
        """Return whether a prefetched batch is out of date: a caller is gone, or one that waits goes before it."""
        is_overtaken = first is not None and any(first.order < entry.order for entry in self.entries)
        return is_overtaken or any(entry.drop_reason() for entry in self.entries)

    def prefetch(self, concatenate: Concatenator, thread: WorkerPool) -> None:
        """Begin to concatenate the images on a thread."""
        self.concatenated = Future()
        thread.submit(_fulfil, self.concatenated, concatenate, [entry.images for entry in self.entries])

    def concatenate(self, concatenate: Concatenator) -> Images | None:
        """Return the images of all entries; None if there are none or they cannot be concatenated."""
        parts = [entry.images for entry in self.entries]
        try:
            if self.concatenated:
                return self.concatenated.result()
            return concatenate(parts) if len(parts) > 1 else parts[0] if parts else None
        except Exception:
            log.exception("a batch of %d requests cannot be concatenated", len(parts))
            return None

    def respond(self, probabilities: Probabilities | None, compute_ns: int) -> None:
        """Respond to all requests; without probabilities, with an error."""
        for entry, error in self.dropped:
            entry.respond(error)
        start = 0
        for entry in self.entries:
            stop = start + len(entry.images)
            if probabilities is None:
                entry.respond(InternalError("the engine failed; the server's log has the details"))
            else:
                queue_ns = self.start_ns - entry.arrival_ns
                entry.respond(BatchResult(probabilities[start:stop], queue_ns, compute_ns, self.size))
            start = stop


def _fulfil(future: Future[Images], concatenate: Concatenator, parts: list[Images]) -> None:
    """Concatenate the images of several requests into a future."""
    try:
        future.set_result(concatenate(parts))
    except BaseException as error:
        future.set_exception(error)
