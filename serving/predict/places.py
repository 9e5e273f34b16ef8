"""Files on this machine and in object storage, by path or URL: found, read and written. fsspec opens the URLs."""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from resnet import BadInput
from resnet.files import open_regular

FileContent = bytes | Exception
"""What a file holds, or why it cannot be read."""

TAGS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")  # of which file systems have one or another


class DataFile(NamedTuple):
    """A file, its bytes, and a text that changes with its content."""

    place: str
    size: int
    tag: str


def is_remote(place: str) -> bool:
    """Return whether a place is a URL."""
    return "://" in place


def find_scheme(place: str) -> str:
    """Return the scheme of a URL; empty for a path."""
    return place.partition("://")[0] if is_remote(place) else ""


def find(place: str) -> Iterator[DataFile]:
    """Yield the visible files that a file, a folder (with those in it) or a glob names, in order.

    Raises:
        BadInput: There is nothing, or it cannot be read.
    """
    if not is_remote(place):
        is_glob = glob.has_magic(place) and not os.path.lexists(place)  # a file may have such a name
        for name in sorted(glob.glob(place, recursive=True)) if is_glob else [place]:  # noqa: PTH207  # of any root
            yield from _walk(Path(name))
        return
    with explaining(place):
        system, path = _connect(place)
        found = system.glob(path, detail=True) if glob.has_magic(path) else {path: system.info(path)}
        for name, info in sorted(found.items()):
            entries = system.find(name, detail=True) if info["type"] == "directory" else {name: info}
            inside = len(name.rstrip("/"))
            for inner, entry in sorted(entries.items()):
                if "/." not in inner[inside:]:
                    tag = next((str(entry[key]) for key in TAGS if key in entry), "")
                    yield DataFile(system.unstrip_protocol(inner), int(entry["size"] or 0), tag)


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
        if is_remote(place):
            system, path = _connect(place)
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
    system, _ = _connect(places[0])
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
        system, target = _connect(place)
        system.put_file(str(path), target)


def exists(place: str) -> bool:
    """Return whether there is a file.

    Raises:
        BadInput: That cannot be found out.
    """
    if not is_remote(place):
        return os.path.lexists(place)
    with explaining(place, "written"):
        system, path = _connect(place)
        return bool(system.exists(path))


@contextmanager
def explaining(place: str, verb: str = "read") -> Iterator[None]:
    """Convert the errors of file systems, whose libraries have classes of their own, to `BadInput`."""
    try:
        yield
    except (BadInput, MemoryError, GeneratorExit):
        raise
    except FileNotFoundError:
        raise BadInput(f"{place} does not exist") from None
    except OSError as error:
        raise BadInput(f"{place} cannot be {verb} ({error.strerror or error})") from None
    except Exception as error:
        if not is_remote(place):
            raise
        raise BadInput(f"{place} cannot be {verb} ({str(error).strip() or type(error).__name__})") from None


def _connect(url: str) -> tuple[Any, str]:
    """Return the file system of a URL, and the path in it.

    Raises:
        BadInput: No installed package knows the scheme.
    """
    try:
        from fsspec.core import url_to_fs
    except ModuleNotFoundError:
        raise BadInput(
            f"{url} needs fsspec; install resnet with its extra 'storage' (pip install 'resnet[storage]')"
        ) from None
    try:
        system, path = url_to_fs(url)
    except ImportError as error:
        raise BadInput(f"{url} cannot be opened: {str(error).rstrip('.')}") from None
    except ValueError:
        raise BadInput(
            f"{url} has the unknown scheme {find_scheme(url)!r}; fsspec knows s3, gs, az, hf, https and more"
        ) from None
    return system, path
