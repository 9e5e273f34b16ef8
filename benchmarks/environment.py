"""What a figure was measured with: without it, no figure can be compared."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from export.speed import name_cpu


def describe(libraries: Iterable[str]) -> dict[str, Any]:
    """Return processor, cores, versions and commit of this machine and this source tree."""
    return {
        "cpu": name_cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {library: version(library) for library in libraries},
        "commit": _commit(),
    }


def _commit() -> str:
    """Return the commit of this source tree; empty in an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
