"""The traffic of a version: rates and latencies between two statuses of a server."""

from __future__ import annotations

from typing import NamedTuple

from protos import admin_pb2 as pb
from resnet.histogram import find_quantile

EMPTY = pb.VersionStatus()


class VersionTraffic(NamedTuple):
    """The requests to a version in an interval.

    Attributes:
        requests_per_second: Requests, answered or not.
        images_per_second: Images of answered requests.
        failed: Share of the requests that failed, 0 to 1; None without any.
        p50_seconds: Median latency of answered requests; None without any.
        p99_seconds: Their 99th percentile.
        since_load: `failed` and the latencies are those since the version was loaded: no request ended in the interval.
    """

    requests_per_second: float
    images_per_second: float
    failed: float | None
    p50_seconds: float | None
    p99_seconds: float | None
    since_load: bool


def measure(before: pb.VersionStatus | None, after: pb.VersionStatus, seconds: float) -> VersionTraffic:
    """Return the traffic of an interval.

    Args:
        before: Status at the beginning; None for a version that was not loaded then.
        after: Status at the end.
        seconds: Length of the interval.
    """
    if before is None or before.images > after.images or count_requests(before) > count_requests(after):
        before = EMPTY  # loaded meanwhile, or again: all that it has counted is of the interval
    requests = count_requests(after) - count_requests(before)
    since = before if requests else EMPTY
    ended = count_requests(after) - count_requests(since)
    latency = _subtract(after.latency, since.latency)
    return VersionTraffic(
        requests_per_second=requests / seconds if seconds else 0.0,
        images_per_second=(after.images - before.images) / seconds if seconds else 0.0,
        failed=(count_failed(after) - count_failed(since)) / ended if ended else None,
        p50_seconds=find_seconds(latency, 0.5),
        p99_seconds=find_seconds(latency, 0.99),
        since_load=not requests,
    )


def count_requests(version: pb.VersionStatus) -> int:
    """Return the requests since the version was loaded."""
    return sum(version.requests.values())


def count_failed(version: pb.VersionStatus) -> int:
    """Return the requests without an answer since the version was loaded."""
    return count_requests(version) - version.requests.get("OK", 0)


def find_seconds(histogram: pb.Histogram, share: float) -> float | None:
    """Return a quantile in seconds, as `resnet.histogram.find_quantile` does; None if the histogram is empty."""
    ns = find_quantile(histogram.bounds_ns, histogram.counts, share)
    return None if ns is None else ns / 1e9


def _subtract(after: pb.Histogram, before: pb.Histogram) -> pb.Histogram:
    earlier = before.counts or [0] * len(after.counts)
    counts = [max(0, late - early) for late, early in zip(after.counts, earlier, strict=True)]
    return pb.Histogram(bounds_ns=after.bounds_ns, counts=counts)
