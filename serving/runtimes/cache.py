"""The cache of a user: what is measured or compiled here is kept out of the model repository, which others write."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path
from typing import TypeVar

import msgspec

from export import files

RecordT = TypeVar("RecordT", bound=msgspec.Struct)

log = logging.getLogger(__name__)


def find_folder(name: str) -> Path:
    """Return a folder in the user's cache; for a user without a home, one that cannot be written."""
    return _find_root() / "resnet" / name


def find_file(name: str, key: msgspec.Struct) -> Path:
    """Return the file for a key in a folder of the cache."""
    return find_folder(name) / f"{hashlib.sha256(msgspec.json.encode(key, order='deterministic')).hexdigest()}.json"


def read(path: Path, kind: type[RecordT], consequence: str) -> RecordT | None:
    """Return the record in a file of the cache; None if there is none that can be used.

    Args:
        path: The file.
        kind: Type of the record.
        consequence: What happens without it, in words, for a warning about a file that is no such record.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.DecodeError) as error:
        log.warning("%s cannot be used (%s); %s", path, error, consequence)
        return None


def write(path: Path, record: msgspec.Struct, consequence: str) -> None:
    """Write a record to a file of the cache, in one step; if that fails, a warning says the consequence."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, msgspec.json.format(msgspec.json.encode(record), indent=2))
    except OSError as error:
        log.warning("%s cannot be written (%s); %s", path, error.strerror, consequence)


def _find_root() -> Path:
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"])
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        return Path("/.cache")
