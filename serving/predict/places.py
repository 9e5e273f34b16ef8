"""Files on this machine and in object storage, by path or URL: found, read and written. fsspec opens the URLs."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

from resnet import BadInput, storage
from resnet.files import open_regular
from resnet.storage import connect, find_tag, is_url

FileContent = bytes | Exception
"""What a file holds, or why it cannot be read."""


class DataFile(NamedTuple):
    """A file, its bytes, and a text that changes with its content."""

    place: str
    size: int
    tag: str


def find_scheme(place: str) -> str:
    """Return the scheme of a URL; empty for a path."""
    return place.partition("://")[0] if is_url(place) else ""


def find(place: str) -> Iterator[DataFile]:
    """Yield the visible files that a file, a folder (with those in it) or a glob names, in order.

    Raises:
        BadInput: There is nothing, or it cannot be read.
    """
    if not is_url(place):
        is_glob = glob.has_magic(place) and not os.path.lexists(place)  # a file may have such a name
        for name in sorted(glob.glob(place, recursive=True)) if is_glob else [place]:  # noqa: PTH207  # of any root
            yield from _walk(Path(name))
        return
    with explaining(place):
        system, path = connect(place)
        found = system.glob(path, detail=True) if glob.has_magic(path) else {path: system.info(path)}
        for name, info in sorted(found.items()):
            entries = system.find(name, detail=True) if info["type"] == "directory" else {name: info}
            inside = len(name.rstrip("/"))
            for inner, entry in sorted(entries.items()):
                if "/." not in inner[inside:]:
                    yield DataFile(system.unstrip_protocol(inner), int(entry["size"] or 0), find_tag(entry))


def _walk(path: Path) -> Iterator[DataFile]:
    with explaining(str(path)):
        status = path.stat()
        entries = sorted(path.iterdir()) if stat.S_ISDIR(status.st_mode) else None
    if entries is None:
        yield DataFile(str(path), status.st_size, str(status.st_mtime_ns))
        return
    for entry in entries:
        if not entry.name.startswith("."):
            yield from _walk(entry)


@contextmanager
def open_place(place: str) -> Iterator[BinaryIO]:
    """Open a file to read; it can be sought.

    Raises:
        BadInput: It cannot be opened, or read within the context.
    """
    with explaining(place):
        if is_url(place):
            system, path = connect(place)
            with system.open(path, "rb") as file:
                yield file
        else:
            with open_regular(Path(place)) as file:
                yield file


def read_all(places: Sequence[str]) -> list[FileContent]:
    """Return the contents of files in object storage, of one scheme, which are read at the same time.

    Raises:
        BadInput: One cannot be read now, other than one that is no longer there.
    """
    system, _ = connect(places[0])
    paths = [system._strip_protocol(place) for place in places]
    found = system.cat(paths, on_error="return")
    for place, path in zip(places, paths, strict=True):
        if isinstance(found[path], Exception) and not isinstance(found[path], FileNotFoundError):
            with explaining(place):
                raise found[path]
    return [found[path] for path in paths]


def upload(path: Path, place: str) -> None:
    """Write a file to a URL; it appears there whole.

    Raises:
        BadInput: It cannot be written.
    """
    with explaining(place, "written"):
        system, target = connect(place)
        system.put_file(str(path), target)


def exists(place: str) -> bool:
    """Return whether there is a file.

    Raises:
        BadInput: That cannot be found out.
    """
    if not is_url(place):
        return os.path.lexists(place)
    with explaining(place, "written"):
        system, path = connect(place)
        return bool(system.exists(path))


@contextmanager
def explaining(place: str, deed: str = "read") -> Iterator[None]:
    """Convert the errors of file systems to `BadInput`."""
    try:
        with storage.explaining(place, deed) if is_url(place) else nullcontext():
            yield
    except FileNotFoundError:
        raise BadInput(f"{place} does not exist") from None
    except OSError as error:
        raise BadInput(f"{place} cannot be {deed} ({error.strerror or error})") from None
