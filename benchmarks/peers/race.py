"""The race: interleaved rounds over all systems, of which one at a time is measured while the others are idle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from benchmarks.load.targets import Workload
from benchmarks.peers.systems import System
from resnet import BadInput, CheckFailed
from resnet.table import render

WARM_UP_SECONDS = 1.0


WORKLOADS = ALONE, FEW, MANY, BATCHES = Workload(1, 1), Workload(1, 8), Workload(1, 32), Workload(32, 8)
HEADER = (
    "system",
    "1 image, 1 in flight: images/s",
    "8 in flight",
    "32 in flight",
    "p50 ms",
    "p99 ms",
    "32 images, 8 in flight: images/s",
    f"CPU ms per image ({MANY})",
    "memory MB",
)


@dataclass(frozen=True)
class Figures:
    """The figures of one measurement.

    Attributes:
        images_per_second: Throughput in images per second.
        p50_ms: Median latency in milliseconds.
        p99_ms: 99th percentile of the latency in milliseconds.
        cpu_ms: CPU time of the system per image, in milliseconds.
        memory_mb: Memory of the system at the end, in megabytes.
    """

    images_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    memory_mb: float


@dataclass
class RaceRow:
    """A system and its figures, or the reason why it has none.

    Attributes:
        title: Name in the table.
        start: Starts the system; raises BadInput if it cannot start, CheckFailed if its answers are wrong.
        system: The running system; None before its start and after its end.
        rounds: By workload, the figures of each round.
        problem: Why the system was not measured, or no longer; empty if it was.
    """

    title: str
    start: Callable[[], System]
    system: System | None = None
    rounds: dict[Workload, list[Figures]] = field(default_factory=lambda: {workload: [] for workload in WORKLOADS})
    problem: str = ""

    def median(self, workload: Workload, figure: str) -> float:
        """Return the median over the rounds of one of the `Figures`."""
        return float(statistics.median(getattr(figures, figure) for figures in self.rounds[workload]))

    def peak_mb(self) -> float:
        """Return the largest memory of all measurements, in megabytes."""
        return max(figures.memory_mb for rounds in self.rounds.values() for figures in rounds)

    def begin(self) -> None:
        """Start the system and warm it up."""

        def start() -> None:
            self.system = self.start()
            for workload in WORKLOADS:
                self.system.measure(workload, WARM_UP_SECONDS)
            self._suspend()

        self._attempt(start)

    def measure(self, workload: Workload, seconds: float) -> None:
        """Measure the system once under a workload, if it still runs."""

        def measure() -> None:
            assert self.system is not None
            if self.system.restless:
                self.system.tree.resume()
            self.rounds[workload].append(_measure(self.system, workload, seconds))
            self._suspend()

        if self.system:
            self._attempt(measure)

    def end(self) -> None:
        """Stop the system."""
        if self.system:
            self.system.stop()
        self.system = None

    def _suspend(self) -> None:
        if self.system and self.system.restless:
            self.system.tree.pause()

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something that may fail; a system that failed leaves the race, and the others go on."""
        try:
            action()
        except (BadInput, CheckFailed, OSError, ValueError, grpc.RpcError) as error:
            self.problem = str(error)
            self.end()


def race(rows: Sequence[RaceRow], rounds: int, seconds: float, report: Callable[[str], None]) -> None:
    """Measure all systems, one after the other under each workload, round by round.

    Args:
        rows: The systems, which are started and stopped here.
        rounds: Measurements of each system under each workload.
        seconds: Duration of one measurement.
        report: Receives a line of progress.
    """
    try:
        for row in rows:
            report(f"starting {row.title}")
            row.begin()
            if row.problem:
                report(f"  {row.problem}")
        for number in range(rounds):
            for workload in WORKLOADS:
                for row in rows:
                    row.measure(workload, seconds)
                    if row.system:
                        figures = row.rounds[workload][-1]
                        report(
                            f"round {number + 1} of {rounds}, {workload}: {figures.images_per_second:7,.0f} images/s, "
                            f"p99 {figures.p99_ms:6.1f} ms, {figures.cpu_ms:5.2f} ms of CPU per image: {row.title}"
                        )
    finally:
        for row in rows:
            row.end()


def _measure(system: System, workload: Workload, seconds: float) -> Figures:
    cpu, start = system.tree.cpu_seconds(), time.perf_counter()
    sample = system.measure(workload, seconds)
    # The load lasts a little longer than the part of it that counts, so CPU time is divided by its full duration.
    cpu, duration = system.tree.cpu_seconds() - cpu, time.perf_counter() - start
    if sample.failures:
        raise CheckFailed(f"under a load of {workload} requests were refused: {dict(sample.failures)}")
    p50, p99 = np.percentile(sample.latencies_ms, (50, 99))
    return Figures(
        images_per_second=sample.images_per_second,
        p50_ms=float(p50),
        p99_ms=float(p99),
        cpu_ms=1e3 * cpu / (duration * sample.images_per_second),
        memory_mb=system.tree.memory_bytes() / 1e6,
    )


def as_dict(row: RaceRow) -> dict[str, Any]:
    """Return all figures of a row, for JSON."""
    return {
        "system": row.title,
        "problem": row.problem,
        "rounds": {str(workload): [vars(figures) for figures in rounds] for workload, rounds in row.rounds.items()},
    }


def render_rows(rows: Sequence[RaceRow]) -> str:
    """Return the medians as a table in Markdown; a system that was not measured has its problem in its row."""
    return render(HEADER, [_list_cells(row) for row in rows])


def _list_cells(row: RaceRow) -> list[str]:
    if not all(row.rounds.values()):
        return [f"{row.title}: {row.problem}", *[""] * (len(HEADER) - 1)]
    title = f"{row.title} ({len(row.rounds[BATCHES])} rounds, then: {row.problem})" if row.problem else row.title
    alone, few, many, batches = (f"{row.median(workload, 'images_per_second'):,.0f}" for workload in WORKLOADS)
    p50, p99, cpu = (row.median(MANY, figure) for figure in ("p50_ms", "p99_ms", "cpu_ms"))
    return [title, alone, few, many, f"{p50:.1f}", f"{p99:.1f}", batches, f"{cpu:.2f}", f"{row.peak_mb():,.0f}"]
