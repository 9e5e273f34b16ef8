"""The results of `resnet load` as text: the table, the progress line, and warnings."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.load.generator import ClosedLoop
from benchmarks.load.sweep import Point
from resnet.table import render

HEADER = ("load", "images/s", "in time", "p50 ms", "p95 ms", "p99 ms", "95 % CI of p99", "not answered")
LATE_MS = 10  # a load generator that falls further behind is reported


def render_points(points: Sequence[Point]) -> str:
    """Return the table, in Markdown."""
    return render(HEADER, [_list_cells(point) for point in points])


def name_point(point: Point) -> str:
    """Return what the table calls a load."""
    load = point.load
    name = f"{load.in_flight:,} in flight" if isinstance(load, ClosedLoop) else f"{load.rate:,.0f} requests/s"
    return name if point.images == 1 else f"{name} of {point.images}"


def describe_progress(point: Point) -> str:
    """Return a line about the round that was measured last."""
    p99 = point.percentile(99)
    latency = f"p99 {p99.value:.1f} ms" if p99 else "nothing was answered"
    return f"{name_point(point)}, round {len(point.samples)}: {point.images_per_second:,.0f} images/s, {latency}"


def list_warnings(points: Sequence[Point]) -> list[str]:
    """Return a warning if the load generator itself fell behind."""
    late = [f"{name_point(point)} ({point.late_ms:.0f} ms)" for point in points if point.late_ms > LATE_MS]
    if not late:
        return []
    return [f"the load generator fell behind at {', '.join(late)}; use more --clients, or more cores"]


def _list_cells(point: Point) -> list[str]:
    estimates = [point.percentile(percent) for percent in (50, 95, 99)]
    p99 = estimates[-1]
    return [
        name_point(point),
        f"{point.images_per_second:,.0f}",
        f"{point.good_per_second:,.0f}",
        *(f"{estimate.value:.2f}" if estimate else "-" for estimate in estimates),
        " to ".join("?" if bound is None else f"{bound:.2f}" for bound in p99[1:]) if p99 else "-",
        ", ".join(f"{count:,} {status}" for status, count in point.failures.most_common()) or "0",
    ]
