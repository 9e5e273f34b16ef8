"""The machine and the software of a measurement, without which its figures cannot be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from export.speed import name_cpu


def describe(libraries: Iterable[str]) -> dict[str, Any]:
    """Return CPU, number of cores, Python, commit, and the versions of the libraries that are installed."""
    return {
        "cpu": name_cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {library: number for library in libraries if (number := _find_version(library))},
        "commit": _find_commit(),
    }


def _find_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _find_commit() -> str:
    """Return the commit of this source tree; empty for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
