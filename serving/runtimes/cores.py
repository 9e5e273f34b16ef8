"""The number of cores to compute with. Imports nothing heavy, for processes that must start quickly."""

from __future__ import annotations

import math
import os
from pathlib import Path


def count_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many cores this process may use: those of its CPU affinity, limited by the CPU quota of its container.

    With a thread for each core of a large machine, a container with a quota of two cores would be throttled most of the
    time.
    """
    affinity = len(os.sched_getaffinity(0))
    try:
        limit, period = quota.read_text().split()
        return min(affinity, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # no such file, or no limit: it contains `max`
        return affinity
