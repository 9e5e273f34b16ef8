"""What a batch costs: its time by its number of images, measured once and kept true by every batch since."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence

NEARLY = 1.05  # is within the noise of measuring
WEIGHT = 0.2  # of the newest batch: five batches ago counts for a third
SHARED = 0.1  # for batches of other sizes
LIMIT = 4.0  # to how far one batch is believed: it may have been held up by something else


class CostCurve:
    """Nanoseconds of a batch, by its number of images; threads may share one."""

    def __init__(self, measured: Mapping[int, float] | None = None) -> None:
        """Begin with what was measured: nanoseconds by number of images, which may be nothing."""
        # Replaced whole, never changed: whoever reads it needs no lock. Sizes ascend; each has its time.
        sizes = sorted(measured or ())
        self._known: tuple[Sequence[int], Sequence[float]] = sizes, [(measured or {})[size] for size in sizes]
        self._lock = threading.Lock()

    def points(self) -> dict[int, float]:
        """Return what is known, by number of images, the smallest first."""
        return dict(zip(*self._known, strict=True))

    def ns(self, images: int) -> float:
        """Return what a batch will take: between two sizes that are known on the line through them, beyond the largest
        in proportion, below the smallest as long as that; 0 while nothing is known.
        """
        sizes, times = self._known
        if not sizes:
            return 0.0
        at = bisect_left(sizes, images)
        if at == len(sizes):
            return times[-1] * images / sizes[-1]
        if at == 0 or sizes[at] == images:
            return times[at]
        share = (images - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return times[at - 1] + share * (times[at] - times[at - 1])

    def best(self, most: int) -> int:
        """Return the smallest known size up to `most` at which an image costs nearly the least: more of them in a batch
        would only be answered later. It is `most` where none is known.
        """
        each = {size: ns / size for size, ns in self.points().items() if size <= most}
        return min((size for size in each if each[size] <= NEARLY * min(each.values())), default=most)

    def learn(self, images: int, ns: float) -> None:
        """Take in what a batch has taken: what slowed it, or made it quicker, does so to other sizes too.

        By powers of the factor, because they cancel out: a batch that took long, and those after it that did not, leave
        other sizes as they were.
        """
        with self._lock:
            sizes, times = self._known
            at = bisect_left(sizes, images)
            if expected := self.ns(images):
                ns = min(max(ns, expected / LIMIT), expected * LIMIT)
            if at < len(sizes) and sizes[at] == images:
                factor = ns / times[at]
                shared = factor**SHARED
                learned = [time * shared for time in times]
                learned[at] = times[at] * factor**WEIGHT
                self._known = sizes, learned
            else:
                self._known = [*sizes[:at], images, *sizes[at:]], [*times[:at], max(ns, 1.0), *times[at:]]
