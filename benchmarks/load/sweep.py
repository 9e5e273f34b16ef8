"""A sweep: one server under a series of loads, with rising numbers of requests in flight or rising rates."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.load import percentiles, server_side
from benchmarks.load.endpoints import Endpoint
from benchmarks.load.generator import NOT_SENT, ClosedLoop, Load, OpenLoop
from benchmarks.load.percentiles import Estimate
from benchmarks.load.processes import LoadProcesses
from benchmarks.load.samples import Sample, summarize
from benchmarks.load.server_side import MIB, ServerTimes, Usage
from resnet import CheckFailed

PERCENTS = (50, 90, 95, 99, 99.9)
CAPACITY_SHARES = (0.5, 0.8, 0.95, 2.0, 5.0)  # loads that a service should bear, and overloads it should survive
SUSTAINED = 0.95  # share of the offered rate; a server that answers less is saturated


@dataclass
class Point:
    """One load, and its measurements.

    Attributes:
        load: The load.
        images: Images per request.
        samples: One sample per round.
        server_times: The server's own statistics over all rounds, warm-up included; None if it keeps none.
        usage: CPU time and memory of the server's processes over all rounds, warm-up included; None if not measured.
        sent: Images sent over all rounds, warm-up included.
    """

    load: Load
    images: int
    samples: list[Sample] = field(default_factory=list)
    server_times: ServerTimes | None = None
    usage: Usage | None = None
    sent: int = 0

    def percentile(self, percent: float) -> Estimate | None:
        """Return a percentile of the latencies of all rounds, in milliseconds; None if nothing was answered."""
        latencies = _join([sample.latencies_ms for sample in self.samples])
        return percentiles.estimate(latencies, percent) if len(latencies) else None

    @property
    def images_per_second(self) -> float:
        """Throughput: the median of the rounds."""
        return statistics.median(sample.images_per_second for sample in self.samples)

    @property
    def good_per_second(self) -> float:
        """Goodput, the images answered within the deadline: the median of the rounds."""
        return statistics.median(sample.good_per_second for sample in self.samples)

    @property
    def failures(self) -> Counter[str]:
        """Number of requests without an answer, by status."""
        return sum((Counter(sample.failures) for sample in self.samples), Counter())

    @property
    def late_ms(self) -> float:
        """The 99th percentile of how late the load generator sent its requests, in milliseconds."""
        delays = _join([sample.late_ms for sample in self.samples])
        return float(np.percentile(delays, 99)) if len(delays) else 0.0

    @property
    def cpu_ms_per_image(self) -> float | None:
        """CPU time of the server per image sent, in milliseconds."""
        return 1e3 * self.usage.cpu_seconds / self.sent if self.usage and self.sent else None

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, for JSON."""
        rates = [sample.images_per_second for sample in self.samples]
        latencies = {f"p{percent:g}": self.percentile(percent) for percent in PERCENTS}
        figures: dict[str, Any] = {
            **({"in_flight": self.load.in_flight} if isinstance(self.load, ClosedLoop) else vars(self.load)),
            "images_per_request": self.images,
            "images_per_second": self.images_per_second,
            "rounds_images_per_second": rates,
            "good_images_per_second": self.good_per_second,
            "latency_ms": {name: estimate._asdict() if estimate else None for name, estimate in latencies.items()},
            "answered": sum(len(sample.latencies_ms) for sample in self.samples),
            "failures": dict(self.failures),
            "late_ms_p99": self.late_ms,
        }
        if self.server_times:
            figures |= {"server_ms": self.server_times.mean_ms(), "server_batch_ms": self.server_times.batch_ms()}
        if self.usage:
            figures |= {"cpu_ms_per_image": self.cpu_ms_per_image, "peak_mib": self.usage.peak_bytes / MIB}
        return figures


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """How a sweep measures.

    Attributes:
        seconds: Duration of one measurement.
        rounds: Measurements of every load; rounds are interleaved, and figures summarize all of them.
        warm_up: Seconds of load before each measurement.
        deadline: Timeout of a request in seconds; None is none.
        p99_limit_ms: 99th percentile of the latency above which a server counts as saturated.
        server_pid: Process of the server, on this machine, whose CPU time and memory are measured; None measures none.
    """

    seconds: float = 5.0
    rounds: int = 3
    warm_up: float = 1.0
    deadline: float | None = None
    p99_limit_ms: float = 1000.0
    server_pid: int | None = None


Report = Callable[[Point], None]
"""Receives a point each time another round of it is measured."""


class Sweep:
    """Measures an endpoint under a series of loads."""

    def __init__(
        self, endpoint: Endpoint, processes: LoadProcesses, plan: SweepPlan, report: Report = lambda _: None
    ) -> None:
        """Prepare to measure; `processes` must be connected to `endpoint`."""
        self._endpoint, self._processes, self._plan, self._report = endpoint, processes, plan, report

    def run(self, loads: Sequence[Load], stop: bool = False) -> list[Point]:
        """Measure every load once per round, so that a disturbance of the machine affects all loads alike.

        Args:
            loads: From the lowest to the highest.
            stop: Leave out the loads above the first one that saturates the server.
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
        """Return whether the server falls behind the rate of an open loop, or exceeds the latency limit."""
        if not isinstance(point.load, OpenLoop):
            return False
        p99 = point.percentile(99)
        offered = point.images * sum(len(sample.late_ms) for sample in point.samples) / self._plan.seconds
        sustained = sum(sample.images_per_second for sample in point.samples) >= SUSTAINED * offered
        return not sustained or p99 is None or p99.value > self._plan.p99_limit_ms

    def _measure(self, point: Point, round_: int) -> None:
        plan, endpoint = self._plan, self._endpoint
        load = point.load
        if isinstance(load, OpenLoop):  # the same arrivals in every round would repeat the same bursts
            load = replace(load, seed=load.seed + round_)
        times_before = server_side.read_times(endpoint.address, endpoint.input.model, endpoint.access)
        usage_before = self._read_usage()
        end = plan.warm_up + plan.seconds
        trace = self._processes.run(load, end, plan.deadline)
        self._add_server_side(point, times_before, usage_before)
        point.sent += int((trace.codes != NOT_SENT).sum()) * endpoint.images
        point.samples.append(summarize(trace, load, endpoint.images, plan.warm_up, end, plan.deadline))
        self._report(point)

    def _read_usage(self) -> Usage | None:
        if self._plan.server_pid is None:
            return None
        server_side.reset_peak(self._plan.server_pid)
        return server_side.read_usage(self._plan.server_pid)

    def _add_server_side(self, point: Point, times_before: ServerTimes | None, usage_before: Usage | None) -> None:
        """Add to a point what the server's statistics and its resource usage grew by."""
        times = server_side.read_times(self._endpoint.address, self._endpoint.input.model, self._endpoint.access)
        if times_before and times:
            point.server_times = point.server_times or ServerTimes()
            point.server_times.add(times)
            point.server_times.add(times_before, -1)
        if usage_before and self._plan.server_pid is not None:
            usage, total = server_side.read_usage(self._plan.server_pid), point.usage or Usage()
            cpu_seconds = usage.cpu_seconds - usage_before.cpu_seconds
            point.usage = Usage(total.cpu_seconds + cpu_seconds, max(total.peak_bytes, usage.peak_bytes))


def take_shares(points: Sequence[Point], arrivals: str) -> list[Load]:
    """Return open loops at shares of the server's capacity, which is the highest throughput measured.

    Raises:
        CheckFailed: The server answered nothing.
    """
    capacity = max(point.images_per_second / point.images for point in points)
    if not capacity:
        raise CheckFailed(
            "the server answered nothing under load, so its capacity is unknown; see whether it is healthy"
        )
    return [OpenLoop(share * capacity, arrivals) for share in CAPACITY_SHARES]


def _join(arrays: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    return np.concatenate(arrays) if arrays else np.zeros(0)
