"""Files of a model repository: read without waiting, listed without following links, and written in one step."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Hashable
from pathlib import Path

from resnet.files import open_regular


def read(path: Path) -> bytes:
    """Return the content of a regular file, which is no link: that can lead anywhere; errors as in `open_regular`."""
    with open_regular(path, follow=False) as file:
        return file.read()


def compute_hash(path: Path) -> str:
    """Return the SHA-256 of a regular file, which is no link; errors as in `open_regular`."""
    with open_regular(path, follow=False) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_entries(folder: Path) -> dict[str, os.stat_result]:
    """Return the status of all files and folders below `folder`, by path inside it; links are not followed.

    Raises:
        OSError: A folder cannot be read, or changes meanwhile.
    """

    def fail(error: OSError) -> None:
        raise error

    entries = {}
    for place, folders, names in os.walk(folder, onerror=fail):
        for name in (*folders, *names):
            path = Path(place, name)
            entries[path.relative_to(folder).as_posix()] = path.lstat()
    return entries


def fingerprint(folder: Path, *others: Path) -> Hashable:
    """Return a value that changes when anything in a folder does, or another file; file contents are not read."""
    try:
        entries = {".": folder.stat(), **list_entries(folder)}
        entries |= {str(path): path.lstat() for path in others if os.path.lexists(path)}
    except OSError as error:
        return error.errno
    return frozenset(
        (name, status.st_mode, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        for name, status in entries.items()
    )


def write(path: Path, content: bytes) -> None:
    """Write a file in one step: readers see the old content or the new one. What fails leaves nothing behind.

    Raises:
        OSError: It cannot be written.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
