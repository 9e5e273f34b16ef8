"""Files on this machine and in object storage, by path or URL: found, read and written. fsspec opens the URLs."""

from __future__ import annotations

import glob
import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Sequence
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


class UnreadableFile(BadInput):
    """A file that is damaged, or that this machine cannot read, now or later: others may be."""


def find_scheme(place: str) -> str:
    """Return the scheme of a URL; empty for a path."""
    return place.partition("://")[0] if is_url(place) else ""


def find(place: str, is_wanted: Callable[[str], bool]) -> Iterator[DataFile]:
    """Yield the visible files that a file, a folder (with those in it) or a glob names, in order.

    Args:
        place: Their path or URL.
        is_wanted: Tells by its name whether a file is one of them; others are not looked at.

    Raises:
        BadInput: There is nothing, or it cannot be read.
    """
    if is_url(place):
        yield from (file for file in _list(place) if is_wanted(file.place))
        return
    names = [place]
    if glob.has_magic(place) and not os.path.lexists(place):  # a file may have such a name
        names = sorted(glob.glob(place, recursive=True))  # noqa: PTH207  # of any root
        _check_any(names, place)
    else:
        with explaining(place):
            Path(place).stat()
    for name in names:
        yield from _walk(Path(name), is_wanted)


def _check_any(found: Collection[str], pattern: str) -> None:
    if not found:
        raise BadInput(f"{pattern} matches no file; mend the pattern, or leave it out")


def _walk(path: Path, is_wanted: Callable[[str], bool], above: tuple[os.stat_result, ...] = ()) -> Iterator[DataFile]:
    try:
        status = path.stat()
    except OSError:  # such as a link to nothing: whoever reads it says so
        if is_wanted(str(path)):
            yield DataFile(str(path), 0, "")
        return
    if not stat.S_ISDIR(status.st_mode):
        if is_wanted(str(path)):
            yield DataFile(str(path), status.st_size, str(status.st_mtime_ns))
        return
    if any(os.path.samestat(status, folder) for folder in above):
        return  # a link to a folder that it is in
    with explaining(str(path)):
        entries = sorted(path.iterdir())
    for entry in entries:
        if not entry.name.startswith("."):
            yield from _walk(entry, is_wanted, (*above, status))


def _list(url: str) -> Iterator[DataFile]:
    with explaining(url):
        system, path = connect(url)
        if glob.has_magic(path) and not system.exists(path):
            # Those of fsspec find hidden files, too.
            root = path.rfind("/", 0, len(re.split(r"[*?[]", path)[0]))
            shows_hidden = "/." in path[root:]
            found = system.glob(path, detail=True)
            found = {name: info for name, info in found.items() if shows_hidden or "/." not in name[root:]}
            _check_any(found, url)
        else:
            found = {path: system.info(path)}
        for name, info in sorted(found.items()):
            entries = system.find(name, detail=True) if info["type"] == "directory" else {name: info}
            inside = len(name.rstrip("/"))
            for inner, entry in sorted(entries.items()):
                if "/." not in inner[inside:]:
                    yield DataFile(system.unstrip_protocol(inner), int(entry["size"] or 0), find_tag(entry))


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
    # Not `cat`, which takes the names of files for patterns.
    found: list[FileContent] = system.cat_ranges(paths, None, None, on_error="return")
    for place, content in zip(places, found, strict=True):
        if isinstance(content, Exception) and not isinstance(content, FileNotFoundError):
            with explaining(place):
                raise content
    return found


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
    except OSError as error:
        kind = BadInput if is_url(place) else UnreadableFile
        if not isinstance(error, FileNotFoundError):
            raise kind(f"{place} cannot be {deed} ({error.strerror or error})") from None
        what = "is a link to nothing" if os.path.islink(place) else "does not exist"  # noqa: PTH114  # or a URL
        raise kind(f"{place} {what}") from None
