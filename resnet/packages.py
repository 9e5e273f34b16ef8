"""Installed packages."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def find_version(name: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


VERSION = find_version("resnet") or "unknown"  # of a source tree that is not installed
