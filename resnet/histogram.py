"""Histograms of durations: counts by upper bounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


def find_quantile(bounds: Sequence[int], counts: Sequence[int], share: float) -> float | None:
    """Return a quantile, interpolated within its bucket as Prometheus' `histogram_quantile` does.

    Args:
        bounds: Upper bounds of the buckets, ascending; the last bucket has none.
        counts: One more than bounds, not cumulative. What is beyond the last bound counts as that bound.
        share: Which quantile, above 0 to 1.

    Returns:
        The quantile in the unit of the bounds; None if the histogram is empty.
    """
    rank = share * sum(counts)
    if not rank:
        return None
    for index, (count, below) in enumerate(zip(counts, accumulate(counts), strict=True)):
        if below >= rank and index < len(bounds):
            low = bounds[index - 1] if index else 0
            part = 1 - (below - rank) / count
            return low + part * (bounds[index] - low)
    return float(bounds[-1])
