"""The race: who is measured when, what becomes of one that fails, and the table."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import pytest

from benchmarks.harness.tree import ProcessTree
from benchmarks.load.samples import Sample
from benchmarks.load.targets import Workload
from benchmarks.peers.race import WORKLOADS, Figures, RaceRow, race, render_rows
from resnet import BadInput, CheckFailed


class CountedTree(ProcessTree):
    """This process, never stopped; its calls are written down."""

    def __init__(self, calls: list[str]) -> None:
        super().__init__(os.getpid())
        self.calls = calls

    def pause(self) -> None:
        """Write it down."""
        self.calls.append("pause")

    def resume(self) -> None:
        """Write it down."""
        self.calls.append("resume")


@dataclass
class Fake:
    """A system that answers as fast as it says, or fails in the measurement of a given number."""

    calls: list[str]
    restless: bool = False
    rate: float = 100.0
    failing: int = 1000
    refused: int = 0
    measured: list[Workload] = field(default_factory=list)
    stopped: int = 0

    def __post_init__(self) -> None:
        self.tree: ProcessTree = CountedTree(self.calls)

    def measure(self, workload: Workload, seconds: float) -> Sample:  # noqa: ARG002
        """Return two answers, or fail."""
        self.calls.append("measure")
        self.measured.append(workload)
        if len(self.measured) == self.failing:
            raise CheckFailed("it answered nothing")
        return Sample(np.array([1.0, 3.0]), self.rate, {"429": self.refused} if self.refused else {})

    def stop(self) -> None:
        """Count it."""
        self.stopped += 1


def read_cells(rows: list[RaceRow]) -> list[list[str]]:
    """Return the cells of the table, without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in render_rows(rows).splitlines()[2:]]


def test_each_system_is_measured_under_each_load_in_each_round() -> None:
    """Rounds are over loads, loads over systems, so that what disturbs the machine disturbs them alike."""
    calls: list[str] = []
    first, second = Fake(calls), Fake(calls)
    rows = [RaceRow("first", lambda: first), RaceRow("second", lambda: second)]
    race(rows, rounds=2, seconds=1, report=lambda _: None)
    assert first.measured == second.measured == 3 * list(WORKLOADS)  # the first time is the warm-up
    assert [len(row.rounds[workload]) for row in rows for workload in WORKLOADS] == 8 * [2]
    assert first.stopped == second.stopped == 1


def test_a_restless_system_runs_only_while_it_is_measured() -> None:
    """It is stopped after its start, and between its measurements."""
    calls: list[str] = []
    race([RaceRow("restless", lambda: Fake(calls, restless=True))], rounds=1, seconds=1, report=lambda _: None)
    assert calls == [*4 * ["measure"], "pause", *4 * ["resume", "measure", "pause"]]


def test_a_system_that_does_not_start_is_a_row_with_a_sentence() -> None:
    """The others are measured all the same."""

    def fail() -> Fake:
        raise BadInput("not installed")

    rows = [RaceRow("missing", fail), RaceRow("there", lambda: Fake([]))]
    race(rows, rounds=1, seconds=1, report=lambda _: None)
    missing, there = read_cells(rows)
    assert missing == ["missing: not installed", *[""] * 8]
    assert there[:7] == ["there", "100", "100", "100", "2.0", "3.0", "100"]


@pytest.mark.parametrize("fake", [Fake([], failing=5), Fake([], refused=2)])
def test_a_system_that_fails_under_load_is_stopped(fake: Fake) -> None:
    """It is measured no more, and what it was measured of is not shown as if it had lasted."""
    row = RaceRow("failing", lambda: fake)
    race([row], rounds=3, seconds=1, report=lambda _: None)
    assert fake.stopped == 1
    assert fake.measured[4:] == [WORKLOADS[0]]
    assert row.problem in read_cells([row])[0][0]


def test_medians_of_the_rounds_until_a_failure_are_kept() -> None:
    """With the number of rounds, and what ended them."""
    row = RaceRow("tired", lambda: Fake([], failing=10))
    race([row], rounds=3, seconds=1, report=lambda _: None)
    (cells,) = read_cells([row])
    assert cells[:2] == ["tired (1 rounds, then: it answered nothing)", "100"]


def test_figures_are_medians_over_rounds() -> None:
    """One round out of the way changes nothing; of memory the most counts."""
    row = RaceRow("system", lambda: Fake([]))
    for rate in (90.0, 100.0, 900.0):
        for workload in WORKLOADS:
            row.rounds[workload].append(Figures(rate, p50_ms=rate, p99_ms=rate, cpu_ms=1.0, memory_mb=rate))
    assert read_cells([row]) == [["system", "100", "100", "100", "100.0", "100.0", "100", "1.00", "900"]]
