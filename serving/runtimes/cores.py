"""How many cores there are to compute with; it imports nothing, for processes that start quickly."""

from __future__ import annotations

import math
import os
from pathlib import Path


def count_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Return how many cores this process may use: those that it is bound to, or what its container's quota comes to.

    With a thread for each core of a large machine, a container that may use two would be halted most of the time.
    """
    bound = len(os.sched_getaffinity(0))
    try:
        limit, period = quota.read_text().split()
        return min(bound, math.ceil(int(limit) / int(period)))
    except (OSError, ValueError):  # no such file, or `max` in it
        return bound
