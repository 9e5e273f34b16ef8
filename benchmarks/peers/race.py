"""Interleaved rounds over all systems: while one is measured, all others are idle."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np

from benchmarks.peers.systems import System
from resnet import BadInput, CheckFailed

WARM_UP_SECONDS = 1.0


@dataclass(frozen=True)
class RaceColumn:
    """A load: so many requests in flight, of so many images each."""

    images: int
    in_flight: int

    def __str__(self) -> str:
        return f"{self.images} x {self.in_flight}"


COLUMNS = FEW, MANY, BATCHES = RaceColumn(1, 8), RaceColumn(1, 32), RaceColumn(32, 8)


@dataclass(frozen=True)
class Figures:
    """What one stretch of load showed.

    Attributes:
        images_per_second: Images answered.
        p50_ms: Median time of a request, in milliseconds.
        p99_ms: The 99th percentile of it.
        cpu_ms: Processor time of the server for one image, in milliseconds.
        memory_mb: What the server occupied at the end, in megabytes.
    """

    images_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    memory_mb: float


@dataclass
class RaceRow:
    """A system, and what was measured of it; or the sentence that says why there is nothing.

    Attributes:
        title: What the table calls it.
        start: Starts it; BadInput if that is not to be had, CheckFailed if it answers differently.
        system: What was started, None when it has ended.
        rounds: Its figures for each load.
        problem: Why it has none, or no more.
    """

    title: str
    start: Callable[[], System]
    system: System | None = None
    rounds: dict[RaceColumn, list[Figures]] = field(default_factory=lambda: {column: [] for column in COLUMNS})
    problem: str = ""

    def median(self, column: RaceColumn, figure: str) -> float:
        """Return the median over the rounds of one of the `Figures`."""
        return float(statistics.median(getattr(found, figure) for found in self.rounds[column]))

    def peak_mb(self) -> float:
        """Return the most memory that was seen."""
        return max(found.memory_mb for rounds in self.rounds.values() for found in rounds)

    def begin(self) -> None:
        """Start the system and warm it up."""

        def work() -> None:
            self.system = self.start()
            for column in COLUMNS:
                self.system.measure(column.in_flight, column.images, WARM_UP_SECONDS)
            self._rest()

        self._attempt(work)

    def go(self, column: RaceColumn, seconds: float) -> None:
        """Measure it once under a load, if it still runs."""

        def work() -> None:
            assert self.system is not None
            if self.system.restless:
                self.system.tree.resume()
            self.rounds[column].append(_measure(self.system, column, seconds))
            self._rest()

        if self.system:
            self._attempt(work)

    def end(self) -> None:
        """Stop the system."""
        if self.system:
            self.system.stop()
        self.system = None

    def _rest(self) -> None:
        if self.system and self.system.restless:
            self.system.tree.pause()

    def _attempt(self, work: Callable[[], None]) -> None:
        """Do what may fail; a system that failed is out of the race, and the others go on."""
        try:
            work()
        except (BadInput, CheckFailed, OSError, ValueError, grpc.RpcError) as error:
            self.problem = str(error)
            self.end()


def race(rows: Sequence[RaceRow], rounds: int, seconds: float, say: Callable[[str], None]) -> None:
    """Measure all systems, one after the other under each load, round by round.

    Args:
        rows: The systems, which begin and end here.
        rounds: How often.
        seconds: Length of one stretch of load.
        say: Told of the progress.
    """
    try:
        for row in rows:
            say(f"starting {row.title}")
            row.begin()
            if row.problem:
                say(f"  {row.problem}")
        for number in range(rounds):
            for column in COLUMNS:
                for row in rows:
                    row.go(column, seconds)
                    if row.system:
                        found = row.rounds[column][-1]
                        say(
                            f"round {number + 1} of {rounds}, {column}: {found.images_per_second:7,.0f} images/s, "
                            f"p99 {found.p99_ms:6.1f} ms, {found.cpu_ms:5.2f} ms of CPU an image: {row.title}"
                        )
    finally:
        for row in rows:
            row.end()


def _measure(system: System, column: RaceColumn, seconds: float) -> Figures:
    cpu, start = system.tree.cpu_seconds(), time.perf_counter()
    sample = system.measure(column.in_flight, column.images, seconds)
    # The load lasts a little longer than the stretch that counts, and so does the processor time.
    cpu, lasted = system.tree.cpu_seconds() - cpu, time.perf_counter() - start
    if sample.failures:
        raise CheckFailed(f"under a load of {column} requests were refused: {dict(sample.failures)}")
    p50, p99 = np.percentile(sample.latencies_ms, (50, 99))
    return Figures(
        images_per_second=sample.images_per_second,
        p50_ms=float(p50),
        p99_ms=float(p99),
        cpu_ms=1e3 * cpu / (lasted * sample.images_per_second),
        memory_mb=system.tree.memory_bytes() / 1e6,
    )


def as_dict(row: RaceRow) -> dict[str, Any]:
    """Return all that was measured of a row, for JSON."""
    return {
        "system": row.title,
        "problem": row.problem,
        "rounds": {str(column): [vars(found) for found in rounds] for column, rounds in row.rounds.items()},
    }


HEADER = (
    "| system | 1 image, 8 in flight: images/s | 1 image, 32 in flight: images/s | p50 ms | p99 ms | "
    "32 images, 8 in flight: images/s | CPU ms per image (1 x 32) | memory MB |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def table(rows: Sequence[RaceRow]) -> str:
    """Return the medians in Markdown; a system that did not last under every load has its sentence instead."""
    return "\n".join([HEADER, *map(_line, rows)])


def _line(row: RaceRow) -> str:
    if not all(row.rounds.values()):
        return f"| {row.title} | {row.problem} | | | | | | |"
    title = f"{row.title} ({len(row.rounds[BATCHES])} rounds, then: {row.problem})" if row.problem else row.title
    rates = {column: f"{row.median(column, 'images_per_second'):,.0f}" for column in COLUMNS}
    p50, p99, cpu = (row.median(MANY, figure) for figure in ("p50_ms", "p99_ms", "cpu_ms"))
    return (
        f"| {title} | {rates[FEW]} | {rates[MANY]} | {p50:.1f} | {p99:.1f} | {rates[BATCHES]} | {cpu:.2f} | "
        f"{row.peak_mb():,.0f} |"
    )
