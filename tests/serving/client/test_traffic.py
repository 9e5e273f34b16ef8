"""Rates and latencies between two statuses."""

from __future__ import annotations

import pytest

from protos import admin_pb2 as pb
from serving.client.traffic import VersionTraffic, find_seconds, measure

BOUNDS = (1_000_000, 2_000_000, 5_000_000)


def histogram(*counts: int) -> pb.Histogram:
    """Return latencies by bucket: up to 1 ms, 2 ms, 5 ms, and above."""
    return pb.Histogram(bounds_ns=BOUNDS, counts=counts)


def version(*counts: int, **failed: int) -> pb.VersionStatus:
    """Return a version that answered so many requests of two images, and failed others."""
    answered = sum(counts)
    return pb.VersionStatus(images=2 * answered, requests={"OK": answered, **failed}, latency=histogram(*counts))


@pytest.mark.parametrize(
    ("counts", "share", "seconds"),
    [
        ((0, 10, 0, 0), 0.5, 1.5e-3),
        ((10, 0, 0, 0), 0.99, 0.99e-3),
        ((5, 5, 0, 0), 0.5, 1e-3),
        ((50, 40, 10, 0), 0.95, 3.5e-3),
        ((1, 0, 0, 99), 0.99, 5e-3),
        ((0, 0, 0, 0), 0.5, None),
        ((), 0.5, None),
    ],
)
def test_a_quantile_is_within_its_bucket(counts: tuple[int, ...], share: float, seconds: float | None) -> None:
    """As Prometheus finds it: linear within a bucket, the last bound for what is beyond."""
    found = find_seconds(pb.Histogram(bounds_ns=BOUNDS, counts=counts), share)
    assert found == (None if seconds is None else pytest.approx(seconds))


def test_traffic_is_that_of_the_interval() -> None:
    """Whatever was before."""
    before, after = version(1000, 0, 0, 0, CANCELLED=7), version(1000, 30, 0, 0, CANCELLED=7, RESOURCE_EXHAUSTED=10)
    found = measure(before, after, 2.0)
    assert found._replace(p50_seconds=None, p99_seconds=None) == VersionTraffic(20.0, 30.0, 0.25, None, None, False)
    assert found.p50_seconds == pytest.approx(1.5e-3)
    assert found.p99_seconds == pytest.approx(1.99e-3)


def test_without_requests_the_rest_is_of_the_time_since_the_load() -> None:
    """The rates are 0; a version that never had any has no latency."""
    same = version(0, 30, 0, 0, CANCELLED=10)
    found = measure(same, same, 1.0)
    assert found[:3] == (0.0, 0.0, 0.25)
    assert found.p50_seconds == pytest.approx(1.5e-3)
    assert found.since_load
    assert measure(version(), version(), 1.0) == VersionTraffic(0.0, 0.0, None, None, None, True)


@pytest.mark.parametrize("before", [None, version(500, 0, 0, 0), pb.VersionStatus(images=99, requests={"OK": 1})])
def test_all_is_of_the_interval_for_a_version_that_was_loaded_in_it(before: pb.VersionStatus | None) -> None:
    """Or loaded again, which its counters show."""
    assert measure(before, version(0, 20, 0, 0), 2.0) == measure(version(), version(0, 20, 0, 0), 2.0)
    assert measure(before, version(0, 20, 0, 0), 2.0)[:3] == (10.0, 20.0, 0.0)


def test_failures_alone_have_no_latency() -> None:
    """Not that of earlier requests."""
    assert measure(version(5), version(5, CANCELLED=1), 1.0) == VersionTraffic(1.0, 0.0, 1.0, None, None, False)
