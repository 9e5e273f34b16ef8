"""The cost of a batch: the time to compute it by its size, measured at the start and updated by every batch.

An estimate must not run away, whatever noise there is. Each follows what batches of its size took, and the others
follow at a fixed share of its steps: these cancel out, so that a slow batch, followed by usual ones, leaves no trace.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence

NOISE = 1.05  # costs within this factor of each other count as equal
MIN_SIZES = 3  # whose costs are compared, to find the best
WEIGHT = 0.2  # of the newest batch; after five further batches a third of that is left
SHARED = 0.5  # exponent of a step of one size for all others: what made a batch slow or fast affects them, too
# Something else may have delayed a batch: what is further above the prediction is clipped. Nothing makes a batch faster
# than it is: a prediction further above what a batch took is wrong, and is corrected at once.
MAX_FACTOR = 4.0
MIN_NS, MAX_NS = 1.0, 1e15  # no batch takes less, or eleven days


class CostCurve:
    """Nanoseconds of a batch by its number of images. Threads may share one."""

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        """Begin with measured nanoseconds by number of images; None if nothing was measured.

        A time that no batch can take, such as 0 or infinity, counts as not measured.
        """
        usable = sorted((size, ns) for size, ns in (measured or {}).items() if MIN_NS <= ns <= MAX_NS)
        # Replaced as a whole, never changed, so that reading needs no lock. Sizes ascend; each has its time.
        self._points: tuple[Sequence[int], Sequence[float]] = [size for size, _ in usable], [ns for _, ns in usable]
        self._lock = threading.Lock()

    def points(self) -> dict[int, float]:
        """Return the nanoseconds of each known size, the smallest size first."""
        return dict(zip(*self._points, strict=True))

    def ns(self, images: int) -> float:
        """Return the predicted nanoseconds of a batch; 0 while nothing is known.

        Linear between two known sizes, proportional above the largest, constant below the smallest.
        """
        sizes, times = self._points
        if not sizes:
            return 0.0
        at = bisect_left(sizes, images)
        if at == len(sizes):
            return times[-1] * images / sizes[-1]
        if at == 0 or sizes[at] == images:
            return times[at]
        share = (images - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return times[at - 1] + share * (times[at] - times[at - 1])

    def find_best_batch(self, max_batch: int) -> int:
        """Return the smallest known batch size with nearly the lowest cost per image: larger batches only add latency.

        It is `max_batch` unless enough sizes up to `max_batch` are known: a warm-up knows two, which are no comparison.
        """
        ns_per_image = {size: ns / size for size, ns in self.points().items() if size <= max_batch}
        if len(ns_per_image) < MIN_SIZES:
            return max_batch
        return min(size for size, ns in ns_per_image.items() if ns <= NOISE * min(ns_per_image.values()))

    def update(self, images: int, ns: float) -> None:
        """Move the curve towards the time that a batch took."""
        if not ns <= MAX_NS:
            return  # no time
        ns = max(ns, MIN_NS)
        with self._lock:
            sizes, times = self._points
            if not sizes:
                self._points = [images], [ns]
                return
            expected = self.ns(images)
            at = min(bisect_left(sizes, images), len(sizes) - 1)  # a larger batch tells about the largest size
            if images < sizes[at]:
                sizes, times = [*sizes[:at], images, *sizes[at:]], [*times[:at], expected, *times[at:]]
            factor = min(ns / expected, MAX_FACTOR)
            step = min(factor**WEIGHT, MAX_FACTOR * factor)
            shared = step**SHARED
            updated = [time * shared for time in times]
            updated[at] = times[at] * step
            self._points = sizes, updated
