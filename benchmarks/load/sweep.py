"""A server under one load after the other: more and more in flight, or more and more a second."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import percentiles, server_side
from benchmarks.load.callers import Callers, Closed, Load, Open
from benchmarks.load.endpoints import Endpoint
from benchmarks.load.percentiles import Estimate
from benchmarks.load.samples import Sample, sample
from benchmarks.load.server_side import MIB, ServerTimes, Usage
from resnet import CheckFailed

PERCENTS = (50, 90, 95, 99, 99.9)
SHARES = (0.5, 0.8, 0.95, 2.0, 5.0)  # of capacity: what a service should bear, and what it should survive
KEPT = 0.95  # of the offered rate; a server that answers less is saturated


@dataclass
class Point:
    """One load, and what was seen of it: a sample for each round.

    Attributes:
        load: How much.
        images: In each request.
        samples: One for each round.
        split: The server's own count over all rounds, warm-up included; None if it does not count.
        usage: What its processes took over all rounds, warm-up included; None if nobody looked.
        sent: Images sent over all rounds, warm-up included.
    """

    load: Load
    images: int
    samples: list[Sample] = field(default_factory=list)
    split: ServerTimes | None = None
    usage: Usage | None = None
    sent: int = 0

    def percentile(self, percent: float) -> Estimate | None:
        """Return a percentile of the latencies of all rounds, in milliseconds; None if nothing was answered."""
        found = _join([sample.latencies_ms for sample in self.samples])
        return percentiles.estimate(found, percent) if len(found) else None

    @property
    def images_per_second(self) -> float:
        """Images answered; the median of the rounds."""
        return statistics.median(sample.images_per_second for sample in self.samples)

    @property
    def good_per_second(self) -> float:
        """Images answered within the deadline; the median of the rounds."""
        return statistics.median(sample.good_per_second for sample in self.samples)

    @property
    def failures(self) -> Counter[str]:
        """Requests that were not answered, by status."""
        return sum((Counter(sample.failures) for sample in self.samples), Counter())

    @property
    def late_ms(self) -> float:
        """How late the load itself sent its requests: the 99th percentile, in milliseconds."""
        found = _join([sample.late_ms for sample in self.samples])
        return float(np.percentile(found, 99)) if len(found) else 0.0

    @property
    def cpu_ms_per_image(self) -> float | None:
        """Milliseconds of the server's processors for each image that was sent."""
        return 1e3 * self.usage.cpu_seconds / self.sent if self.usage and self.sent else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, for JSON."""
        rates = [sample.images_per_second for sample in self.samples]
        latencies = {f"p{percent:g}": self.percentile(percent) for percent in PERCENTS}
        found: dict[str, Any] = {
            **({"in_flight": self.load.in_flight} if isinstance(self.load, Closed) else vars(self.load)),
            "images_per_request": self.images,
            "images_per_second": self.images_per_second,
            "rounds_images_per_second": rates,
            "good_images_per_second": self.good_per_second,
            "latency_ms": {name: estimate._asdict() if estimate else None for name, estimate in latencies.items()},
            "answered": sum(len(sample.latencies_ms) for sample in self.samples),
            "failures": dict(self.failures),
            "late_ms_p99": self.late_ms,
        }
        if self.split:
            found |= {"server_ms": self.split.mean_ms(), "server_batch_ms": self.split.cost_ms()}
        if self.usage:
            found |= {"cpu_ms_per_image": self.cpu_ms_per_image, "peak_mib": self.usage.peak_bytes / MIB}
        return found


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How to measure.

    Attributes:
        seconds: Length of one stretch.
        rounds: Stretches of every load, one after the other in turn; figures are of all.
        warm_up: Seconds before each stretch.
        deadline: Of a request, in seconds; None is none.
        p99_limit_ms: A latency at which a server counts as saturated.
        server_pid: The server's process, on this machine, to be weighed; None leaves that.
    """

    seconds: float = 5.0
    rounds: int = 3
    warm_up: float = 1.0
    deadline: float | None = None
    p99_limit_ms: float = 1000.0
    server_pid: int | None = None


Report = Callable[[Point], None]


class Sweep:
    """Measures an endpoint by a plan."""

    def __init__(self, endpoint: Endpoint, callers: Callers, plan: SweepPlan, report: Report = lambda _: None) -> None:
        """Prepare; `report` is told of every point, each time that a round of it is done."""
        self._endpoint, self._callers, self._plan, self._report = endpoint, callers, plan, report

    def run(self, loads: Sequence[Load], stop: bool = False) -> list[Point]:
        """Measure every load in every round, so that what changes meanwhile changes for all.

        Args:
            loads: From the lowest to the highest.
            stop: Leave out those above the first that saturates the server.
        """
        points: list[Point] = []
        for load in loads:
            points.append(Point(load, self._endpoint.images))
            self._measure(points[-1], round_=0)
            if stop and self.saturated(points[-1]):
                break
        for round_ in range(1, self._plan.rounds):
            for point in points:
                self._measure(point, round_)
        return points

    def saturated(self, point: Point) -> bool:
        """Say whether a server under that rate falls behind."""
        if not isinstance(point.load, Open):
            return False
        p99 = point.percentile(99)
        offered = point.images * sum(len(sample.late_ms) for sample in point.samples) / self._plan.seconds
        kept = sum(sample.images_per_second for sample in point.samples) >= KEPT * offered
        return not kept or p99 is None or p99.value > self._plan.p99_limit_ms

    def _measure(self, point: Point, round_: int) -> None:
        plan, endpoint = self._plan, self._endpoint
        load = point.load
        if isinstance(load, Open):  # the same arrivals again would be the same luck again
            load = replace(load, seed=load.seed + round_)
        before = server_side.count(endpoint.address, endpoint.input.model)
        weight = self._weigh()
        end = plan.warm_up + plan.seconds
        trace = self._callers.run(load, end, plan.deadline)
        self._count(point, before, weight)
        point.sent += len(trace.due) * endpoint.images
        point.samples.append(sample(trace, load, endpoint.images, plan.warm_up, end, plan.deadline))
        self._report(point)

    def _weigh(self) -> Usage | None:
        if self._plan.server_pid is None:
            return None
        server_side.forget_peak(self._plan.server_pid)
        return server_side.weigh(self._plan.server_pid)

    def _count(self, point: Point, before: ServerTimes | None, weight: Usage | None) -> None:
        """Add what the server did since."""
        after = server_side.count(self._endpoint.address, self._endpoint.input.model)
        if before and after:
            point.split = point.split or ServerTimes()
            point.split.add(after)
            point.split.add(before, -1)
        if weight and self._plan.server_pid is not None:
            now, total = server_side.weigh(self._plan.server_pid), point.usage or Usage()
            spent = now.cpu_seconds - weight.cpu_seconds
            point.usage = Usage(total.cpu_seconds + spent, max(total.peak_bytes, now.peak_bytes))


def shares(points: Sequence[Point], arrivals: str) -> list[Load]:
    """Return rates that are shares of what a server answered at most.

    Raises:
        CheckFailed: It answered nothing.
    """
    capacity = max(point.images_per_second / point.images for point in points)
    if not capacity:
        raise CheckFailed("the server answered nothing under load; there is no capacity to take shares of")
    return [Open(share * capacity, arrivals) for share in SHARES]


def _join(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(arrays) if arrays else np.zeros(0)
