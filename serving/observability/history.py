"""The traffic of the last ten minutes, in steps of two seconds: what a page can draw without a database beside it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from resnet.histogram import find_quantile
from serving.models.registry import ModelRegistry
from serving.models.statistics import BOUNDS_NS

INTERVAL_SECONDS, SPAN_SECONDS = 2.0, 600.0
REFUSALS = ("RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")
MILLISECOND = 1e6  # in nanoseconds


class TrafficSample(msgspec.Struct):
    """The traffic of an interval, over all models.

    Attributes:
        time: End of the interval, in seconds since 1970.
        requests_per_second: Requests, answered or not.
        images_per_second: Images of answered requests.
        p50_ms: Median latency of answered requests; None without any.
        p99_ms: Their 99th percentile.
        batch_images: Mean number of images of a batch; None without any.
        queued: Images in the queue at the end.
        refused_per_second: Requests that were refused, or not answered in time.
    """

    time: float
    requests_per_second: float
    images_per_second: float
    p50_ms: float | None
    p99_ms: float | None
    batch_images: float | None
    queued: int
    refused_per_second: float


class RecentTraffic(msgspec.Struct):
    """The samples of the last ten minutes, in order, each of an interval."""

    interval_seconds: float
    samples: list[TrafficSample]


@dataclass
class _Totals:
    requests: int
    images: int
    refused: int
    batches: int
    batch_images: int
    latency: list[int]


class TrafficHistory:
    """The samples of the last ten minutes; threads may share it."""

    def __init__(self, models: ModelRegistry, refusals: Mapping[str, int]) -> None:
        """Begin without samples.

        Args:
            models: The models.
            refusals: Number of calls that were refused before a model was looked up, by the name of their status.
        """
        self._models, self._refusals = models, refusals
        self._samples: deque[TrafficSample] = deque(maxlen=int(SPAN_SECONDS / INTERVAL_SECONDS))
        self._lock = threading.Lock()
        self._before, self._began = self._count(), time.monotonic()

    def sample(self) -> None:
        """Add what happened since the last sample."""
        with self._lock:
            after, now = self._count(), time.monotonic()
            self._samples.append(self._compare(self._before, after, now - self._began))
            self._before, self._began = after, now

    def list_samples(self, since: float = 0.0) -> list[TrafficSample]:
        """Return the samples later than a time, in seconds since 1970, in order."""
        with self._lock:
            return [sample for sample in self._samples if sample.time > since]

    def _count(self) -> _Totals:
        counts = self._models.counts().values()
        batches = [(size, batch.count) for each in counts for size, batch in each.batches.items()]
        return _Totals(
            requests=sum(sum(each.codes.values()) for each in counts) + sum(dict(self._refusals).values()),
            images=sum(each.images for each in counts),
            refused=sum(each.codes.get(code, 0) for each in counts for code in REFUSALS)
            + sum(dict(self._refusals).values()),
            batches=sum(count for _, count in batches),
            batch_images=sum(size * count for size, count in batches),
            latency=_add(each.success.buckets for each in counts),
        )

    def _compare(self, before: _Totals, after: _Totals, seconds: float) -> TrafficSample:
        """Return the traffic between two counts. A model that was unloaded takes its counts along: none is negative."""
        latency = [max(0, late - early) for late, early in zip(after.latency, before.latency, strict=True)]
        batches = after.batches - before.batches
        p50, p99 = (find_quantile(BOUNDS_NS, latency, share) for share in (0.5, 0.99))
        seconds = max(seconds, 1e-3)
        return TrafficSample(
            time=time.time(),
            requests_per_second=max(0, after.requests - before.requests) / seconds,
            images_per_second=max(0, after.images - before.images) / seconds,
            p50_ms=None if p50 is None else p50 / MILLISECOND,
            p99_ms=None if p99 is None else p99 / MILLISECOND,
            batch_images=(after.batch_images - before.batch_images) / batches if batches > 0 else None,
            queued=sum(model.batcher.queued for model in self._models),
            refused_per_second=max(0, after.refused - before.refused) / seconds,
        )


def _add(histograms: Iterable[list[int]]) -> list[int]:
    total = [0] * (len(BOUNDS_NS) + 1)
    for histogram in histograms:
        total = [old + new for old, new in zip(total, histogram, strict=True)]
    return total
