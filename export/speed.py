"""Speed of a variant in relation to another one, on this machine."""

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


def measure_speedup(baseline: Predict, variant: Predict, images: NDArray[np.uint8]) -> dict[int, float]:
    """Return the speed of a variant as a multiple of the baseline's, by batch size: ratios of interleaved medians."""
    speedups = {}
    for size in BATCH_SIZES:
        batch = np.resize(images, (size, *images.shape[1:]))
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for predict, seconds in zip((baseline, variant), times, strict=True):
                seconds.append(_time(predict, batch))
        before, after = (statistics.median(seconds) for seconds in times)
        speedups[size] = round(before / after, 2)
    return speedups


def name_cpu() -> str:
    """Return the name of the CPU, from /proc/cpuinfo."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _time(predict: Predict, batch: NDArray[np.uint8]) -> float:
    """Return the median duration of a call, in seconds; calls repeat for `SECONDS`."""
    predict(batch)
    samples: list[float] = []
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end or not samples:
        started = time.perf_counter()
        predict(batch)
        samples.append(time.perf_counter() - started)
    return statistics.median(samples)
