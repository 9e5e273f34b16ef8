"""What a process holds: memory, threads and descriptors, now and as a trend."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness.background import Background

MIB = 2**20
PAGE_BYTES = 4096


class Footprint(NamedTuple):
    """What a process holds at one time.

    Attributes:
        megabytes: Resident memory in MiB.
        threads: Number of threads.
        descriptors: Number of open files and sockets.
    """

    megabytes: float
    threads: float
    descriptors: float

    @classmethod
    def read(cls, pid: int) -> Footprint:
        """Return the footprint of a process.

        Raises:
            OSError: There is no such process.
        """
        folder = Path(f"/proc/{pid}")
        pages = int((folder / "statm").read_text().split()[1])
        return cls(
            pages * PAGE_BYTES / MIB, len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir()))
        )


class Footprints(Background):
    """Reads the footprint of a process once a second during a `with` block.

    Attributes:
        samples: One row for each second: seconds from the start, and the footprint.
    """

    def __init__(self, pid: int) -> None:
        """Take a process."""
        self.samples: list[tuple[float, Footprint]] = []
        super().__init__()
        self._pid = pid

    def growth(self, after: float) -> Footprint:
        """Return how much the process grew after some seconds, by the trend of the samples and not by the last one."""
        rows = np.array([(seconds, *footprint) for seconds, footprint in self.samples if seconds >= after])
        return Footprint(*(fit_growth(rows[:, 0], column) for column in rows[:, 1:].T))

    def run(self) -> None:
        """Take a sample each second."""
        start = time.monotonic()
        while not self.stopped.wait(1):
            self.samples.append((time.monotonic() - start, Footprint.read(self._pid)))


def fit_growth(times: NDArray[np.float64], values: NDArray[np.float64]) -> float:
    """Return the growth of values over their time by the median slope of all pairs (Theil and Sen): peaks count little.

    Args:
        times: Times, ascending.
        values: One value for each.
    """
    first, second = np.triu_indices(len(times), k=1)
    slopes = (values[second] - values[first]) / (times[second] - times[first])
    return float(np.median(slopes) * (times[-1] - times[0])) if len(slopes) else 0.0
