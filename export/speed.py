"""How fast a variant is against another, on this machine."""

from __future__ import annotations

import platform
import statistics
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from export.parity import Predict

BATCH_SIZES = (1, 32)
ROUNDS, SECONDS = 5, 0.1


def compare(baseline: Predict, other: Predict, images: NDArray[np.uint8]) -> dict[int, float]:
    """Return how many times as fast `other` is as `baseline`, by batch size: ratios of interleaved medians."""
    found = {}
    for size in BATCH_SIZES:
        batch = np.resize(images, (size, *images.shape[1:]))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for predict, seconds in zip((baseline, other), times, strict=True):
                seconds.append(_time(predict, batch))
        slow, quick = (statistics.median(seconds) for seconds in times)
        found[size] = round(slow / quick, 2)
    return found


def name_cpu() -> str:
    """Return the name of this machine's processor, as Linux gives it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _time(predict: Predict, batch: NDArray[np.uint8]) -> float:
    """Return the median seconds of a call, of as many as fit into a moment."""
    predict(batch)
    samples: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or not samples:
        started = time.perf_counter()
        predict(batch)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)
