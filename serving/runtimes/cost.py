"""The cost of a batch: the time to compute it by its size, measured once and updated by every batch."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence

NOISE = 1.05  # costs within this factor of each other count as equal
WEIGHT = 0.2  # of the newest batch; after five further batches a third of that is left
OTHER_SIZES_WEIGHT = 0.1  # of the newest batch, for batches of other sizes
MAX_FACTOR = 4.0  # an observation further from the prediction is clipped: something else may have delayed the batch


class CostCurve:
    """Nanoseconds of a batch by its number of images. Threads may share one."""

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        """Begin with measured nanoseconds by number of images; None if nothing was measured."""
        # Replaced as a whole, never changed, so that reading needs no lock. Sizes ascend; each has its time.
        sizes = sorted(measured or ())
        self._points: tuple[Sequence[int], Sequence[float]] = sizes, [(measured or {})[size] for size in sizes]
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

        It is `max_batch` while no size up to `max_batch` is known.
        """
        ns_per_image = {size: ns / size for size, ns in self.points().items() if size <= max_batch}
        return min(
            (size for size, ns in ns_per_image.items() if ns <= NOISE * min(ns_per_image.values())), default=max_batch
        )

    def update(self, images: int, ns: float) -> None:
        """Move the curve towards the time that a batch took: what made it slow or fast affects other sizes, too.

        All sizes are multiplied by powers of the observed factor. Powers cancel out: a slow batch, followed by usual
        ones, leaves the other sizes as they were.
        """
        with self._lock:
            sizes, times = self._points
            at = bisect_left(sizes, images)
            if expected := self.ns(images):
                ns = min(max(ns, expected / MAX_FACTOR), expected * MAX_FACTOR)
            if at < len(sizes) and sizes[at] == images:
                factor = ns / times[at]
                shared = factor**OTHER_SIZES_WEIGHT
                updated = [time * shared for time in times]
                updated[at] = times[at] * factor**WEIGHT
                self._points = sizes, updated
            else:
                self._points = [*sizes[:at], images, *sizes[at:]], [*times[:at], max(ns, 1.0), *times[at:]]
