"""Model repositories in object storage, for tests."""

from __future__ import annotations

from pathlib import Path

from export import manifest
from resnet.storage import StorageFolder
from tests.versions import COLORS, list_file, write_version


def write_complete(folder: Path) -> Path:
    """Write a version with the files that every export writes, and return the folder."""
    list_file(write_version(folder), "labels.txt", "".join(f"{label}\n" for label in COLORS).encode())
    return folder


def upload(version: Path, url: str) -> None:
    """Upload a version to a repository, its manifest last."""
    storage, place = StorageFolder(url), f"{version.parent.name}/{version.name}"
    names = [path.relative_to(version).as_posix() for path in version.rglob("*") if path.is_file()]
    storage.upload({f"{place}/{name}": version / name for name in names if name != manifest.NAME})
    storage.upload({f"{place}/{manifest.NAME}": version / manifest.NAME})


def take_away(version: str, url: str) -> None:
    """Remove a version, as NAME/VERSION, from a repository."""
    storage = StorageFolder(url)
    storage.remove([name for name in storage.list_files() if name.startswith(f"{version}/")])
