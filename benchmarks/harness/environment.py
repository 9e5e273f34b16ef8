"""What a figure was measured with: without it, no figure can be compared."""

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
    """Return processor, cores, commit and the versions of those libraries that are there."""
    return {
        "cpu": name_cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {library: found for library in libraries if (found := _find_version(library))},
        "commit": _commit(),
    }


def _find_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    """Return the commit of this source tree; empty in an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
