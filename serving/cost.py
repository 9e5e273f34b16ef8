"""What a batch costs: its time by its number of images, measured once and kept true by every batch since."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Mapping

NEARLY = 1.05  # is within the noise of measuring
WEIGHT = 0.2  # of the newest batch: five batches ago counts for a third
SHARED = 0.1  # for batches of other sizes


class CostCurve:
    """Nanoseconds of a batch, by its number of images; threads may share one."""

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        """Begin with what was measured: nanoseconds by number of images, which may be nothing."""
        self._ns = dict(measured or {})
        self._sizes = sorted(self._ns)
        self._lock = threading.Lock()

    def points(self) -> dict[int, float]:
        """Return what is known, by number of images, the smallest first."""
        with self._lock:
            return {size: self._ns[size] for size in self._sizes}

    def ns(self, images: int) -> float:
        """Return what a batch will take: between two sizes that are known on the line through them, beyond the largest
        in proportion, below the smallest as long as that; 0 while nothing is known.
        """
        with self._lock:
            if not self._sizes:
                return 0.0
            at = bisect_left(self._sizes, images)
            if at == len(self._sizes):
                return self._ns[self._sizes[-1]] * images / self._sizes[-1]
            above = self._sizes[at]
            if at == 0 or above == images:
                return self._ns[above]
            below = self._sizes[at - 1]
            share = (images - below) / (above - below)
            return self._ns[below] + share * (self._ns[above] - self._ns[below])

    def best(self, most: int) -> int:
        """Return the smallest known size up to `most` at which an image costs nearly the least: more of them in a batch
        would only be answered later. It is `most` where none is known.
        """
        each = {size: ns / size for size, ns in self.points().items() if size <= most}
        return min((size for size in each if each[size] <= NEARLY * min(each.values())), default=most)

    def learn(self, images: int, ns: float) -> None:
        """Take in what a batch has taken: what slowed it, or made it quicker, does so to other sizes too."""
        with self._lock:
            if images in self._ns:
                factor = ns / self._ns[images]
                for size in self._sizes:
                    self._ns[size] *= 1 + (WEIGHT if size == images else SHARED) * (factor - 1)
            else:
                self._ns[images] = float(ns)
                insort(self._sizes, images)
