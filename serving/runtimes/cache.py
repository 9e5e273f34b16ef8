"""The cache of a user: what is measured or compiled here is kept out of the model repository, which others write."""

from __future__ import annotations

import os
from pathlib import Path


def find_folder(name: str) -> Path:
    """Return a folder in the user's cache; for a user without a home, one that cannot be written."""
    return _find_root() / "resnet" / name


def _find_root() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path("/.cache")
