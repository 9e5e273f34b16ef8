"""The number of cores to compute with. Imports nothing heavy, for processes that must start quickly."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

_limit = sys.maxsize


def limit_cores(count: int) -> None:
    """Let this process compute with `count` cores at most: it was given so many, and nothing enforces it."""
    global _limit  # noqa: PLW0603  # as an affinity, it is the process that has it
    _limit = count


def count_cores(cgroups: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Return how many cores this process may use: those of its CPU affinity, limited by the CPU quotas of its cgroups,
    and by `limit_cores`.

    With a thread for each core of a large machine, a container with a quota of two cores would be throttled most of the
    time.

    Args:
        cgroups: Where cgroups are mounted, of version 1 or 2.
        own: The file that names the cgroups of this process.
    """
    most = min(_limit, len(os.sched_getaffinity(0)))
    quotas = (_read_quota(folder) for folder in _list_cgroups(cgroups, own))
    return min([most, *(max(1, math.ceil(quota)) for quota in quotas if quota is not None)])


def _list_cgroups(cgroups: Path, own: Path) -> Iterator[Path]:
    """Yield the folders that may hold a CPU quota of this process: of its own cgroup and of all above it.

    In a container the mount may begin at the container's own cgroup, whatever path `own` has: folders may be missing.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            mount = cgroups
        elif "cpu" in controllers.split(","):
            mount = cgroups / "cpu"
        else:
            continue
        for folder in (PurePosixPath(path), *PurePosixPath(path).parents):
            yield mount / folder.relative_to("/")


def _read_quota(folder: Path) -> float | None:
    """Return the quota of a cgroup in cores; None if it has none."""
    try:
        if (file := folder / "cpu.max").exists():  # version 2
            limit, period = map(float, file.read_text().split())
        else:
            limit, period = (float((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return limit / period if limit > 0 else None
    except (OSError, ValueError, ZeroDivisionError):  # no such file, or no limit: it contains `max`
        return None
