"""What there is to predict, cut into shards: of image files, tar archives, Parquet tables, and arrays of pixels.

A shard is read on its own, in order, wherever it is computed. The images in it are the same whenever it is read.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, NamedTuple, Protocol, cast

import numpy as np

from resnet import BadInput
from resnet.storage import is_url
from serving.predict import places
from serving.predict.decoder import FileContents
from serving.predict.places import DataFile
from serving.runtimes.base import Images

SHARD = 2048  # images: seconds of work, and many batches
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # all but the first three become errors
TARS, ARRAYS, TABLES = (".tar", ".tar.gz", ".tgz"), (".npy", ".npz"), (".parquet", ".pq")
NO_PARQUET = "{} needs pyarrow; install resnet with its extra 'predict' (pip install 'resnet[predict]')"
READ_AT_ONCE = 128  # files of object storage, each of which takes tens of milliseconds
DAMAGED = (tarfile.TarError, EOFError, zlib.error)

ImageShape = tuple[int, int, int]
"""Height, width and 3."""


class ImageChunk(NamedTuple):
    """Consecutive images of a shard.

    Attributes:
        keys: Their paths, or other names.
        images: Pixels, uint8 [n, height, width, 3], or files.
    """

    keys: Sequence[str]
    images: Images | FileContents


class Shard(Protocol):
    """A part of the data.

    Attributes:
        images: How many it holds; None if that is not known before it is read.
        encoded: Whether they are files, which have to be decoded.
    """

    @property
    def images(self) -> int | None: ...  # noqa: D102

    @property
    def encoded(self) -> bool: ...  # noqa: D102

    def read(self, step: int) -> Iterator[ImageChunk]:
        """Yield its images, `step` at a time.

        Raises:
            BadInput: It cannot be read.
        """
        ...


def find_files(data: Iterable[str]) -> list[DataFile]:
    """Return the files of images that paths, folders, globs and URLs name, in order; other files are left out.

    Raises:
        BadInput: There is nothing, or it cannot be read.
    """
    return [file for place in data for file in places.find(place) if _find_ending(file.place)]


def find_shards(files: Sequence[DataFile], shape: ImageShape, column: str | None = None) -> list[Shard]:
    """Return the shards of files, in order.

    Args:
        files: What `find_files` returned.
        shape: Of the images that the model takes.
        column: The column of Parquet files that holds the images; by default it is found.

    Raises:
        BadInput: One cannot be read, or does not hold what the model takes.
    """
    shards: list[Shard] = []
    for (ending, _), group in groupby(files, lambda file: (_find_ending(file.place), places.find_scheme(file.place))):
        if ending is IMAGES:
            found = [file.place for file in group]
            shards += [ImageFiles(tuple(found[start : start + SHARD])) for start in range(0, len(found), SHARD)]
        elif ending is TARS:
            shards += [shard for file in group for shard in _cut_tar(file)]
        elif ending is ARRAYS:
            shards += [shard for file in group for shard in _cut_array(file.place, shape)]
        elif ending is TABLES:
            shards += [shard for file in group for shard in _cut_table(file.place, shape, column)]
    return shards


def count_encoded(shards: Iterable[Shard]) -> int:
    """Return about how many images of shards have to be decoded."""
    return sum(SHARD if shard.images is None else shard.images for shard in shards if shard.encoded)


def _find_ending(place: str) -> tuple[str, ...]:
    return next((endings for endings in (IMAGES, TARS, ARRAYS, TABLES) if place.lower().endswith(endings)), ())


def _cut_table(place: str, shape: ImageShape, column: str | None) -> Iterator[Shard]:
    try:
        from serving.predict import tables
    except ModuleNotFoundError:
        raise BadInput(NO_PARQUET.format(place)) from None
    return tables.cut(place, shape, SHARD, column)


@dataclass(frozen=True)
class ImageFiles:
    """JPEG and PNG files."""

    encoded: ClassVar = True
    paths: tuple[str, ...]

    @property
    def images(self) -> int:
        """Their number."""
        return len(self.paths)

    def read(self, step: int) -> Iterator[ImageChunk]:
        """Yield them; those on this machine are left to be read by whoever decodes them."""
        remote = is_url(self.paths[0])
        width = -(-READ_AT_ONCE // step) * step  # a multiple of it
        for start in range(0, len(self.paths), width):
            paths = self.paths[start : start + width]
            contents = places.read_all(paths) if remote else [Path(path) for path in paths]
            for at in range(0, len(paths), step):
                yield ImageChunk(paths[at : at + step], contents[at : at + step])


@dataclass(frozen=True)
class TarMembers:
    """Image files in an archive, such as a shard of a WebDataset, from one byte to another."""

    encoded: ClassVar = True
    place: str
    start: int
    size: int
    images: int | None

    def read(self, step: int) -> Iterator[ImageChunk]:
        """Yield them; what is no image is left out, and the rest of a damaged archive is one that cannot be read."""
        keys, contents = list[str](), list[bytes | Exception]()
        with places.open_place(self.place) as file:
            file.seek(self.start)
            source = cast(BinaryIO, _Slice(file, self.size))
            try:
                with tarfile.open(fileobj=source, mode="r|*") as archive:
                    for member in filter(_is_image, archive):
                        content = archive.extractfile(member)
                        contents.append(content.read() if content else b"")
                        keys.append(f"{self.place}/{member.name}")
                        _forget(archive)
                        if len(keys) == step:
                            yield ImageChunk(keys, contents)
                            keys, contents = [], []
            except DAMAGED as error:
                keys, contents = [*keys, self.place], [*contents, error]
        if keys:
            yield ImageChunk(keys, contents)


def _is_image(member: tarfile.TarInfo) -> bool:
    name = member.name.lower()
    return member.isfile() and name.endswith(IMAGES) and not PurePosixPath(name).name.startswith(".")


def _cut_tar(file: DataFile) -> Iterator[TarMembers]:
    """Yield the shards of an archive: one if it is compressed or would have to be fetched to be cut."""
    if is_url(file.place) or not file.place.lower().endswith(".tar"):
        yield TarMembers(file.place, 0, file.size, None)
        return
    start = images = 0
    with places.open_place(file.place) as opened, suppress(*DAMAGED), tarfile.open(fileobj=opened) as archive:
        for member in archive:
            if images == SHARD:
                yield TarMembers(file.place, start, member.offset - start, images)
                start, images = member.offset, 0
            images += _is_image(member)
            _forget(archive)
    yield TarMembers(file.place, start, file.size - start, images)


def _forget(archive: tarfile.TarFile) -> None:
    """Free the headers that were read, so that memory does not grow with the archive."""
    archive.members = []  # type: ignore[attr-defined]


class _Slice:
    """The next bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        content = self._file.read(min(size, self._left))
        self._left -= len(content)
        return content


@dataclass(frozen=True)
class ArrayRows:
    """Rows of an array of pixels: of an .npy file, or the array `images` of an .npz file."""

    encoded: ClassVar = False
    place: str
    start: int
    images: int
    shape: ImageShape

    def read(self, step: int) -> Iterator[ImageChunk]:
        """Yield them."""
        size = int(np.prod(self.shape))
        with _open_array(self.place) as (file, _):
            file.seek(self.start * size, os.SEEK_CUR)
            for row in range(self.start, self.start + self.images, step):
                count = min(step, self.start + self.images - row)
                content = file.read(count * size)
                if len(content) < count * size:
                    yield ImageChunk([self.place], [EOFError(f"it ends before row {row + count}")])
                    return
                keys = [f"{self.place}#{number}" for number in range(row, row + count)]
                yield ImageChunk(keys, np.frombuffer(content, np.uint8).reshape(count, *self.shape))


@contextmanager
def _open_array(place: str) -> Iterator[tuple[BinaryIO, tuple[int, ...]]]:
    """Open the values of an array of uint8, and return its shape."""
    with places.open_place(place) as file:
        try:
            with _open_member(file) if place.lower().endswith(".npz") else nullcontext(file) as values:
                formats = np.lib.format
                version = formats.read_magic(values)
                read_header = formats.read_array_header_1_0 if version == (1, 0) else formats.read_array_header_2_0
                shape, is_fortran, dtype = cast(Callable[..., Any], read_header)(values)
                if dtype != np.uint8 or is_fortran:
                    raise BadInput(f"{place} holds {dtype}, not uint8 in rows; save pixels of 0 to 255")
                yield values, shape
        except (ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise BadInput(f"{place} is no array of pixels, or is damaged ({error})") from None


@contextmanager
def _open_member(file: BinaryIO) -> Iterator[BinaryIO]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        with archive.open(names[0] if len(names) == 1 else "images.npy") as member:
            yield cast(BinaryIO, member)


def _cut_array(place: str, shape: ImageShape) -> Iterator[ArrayRows]:
    with _open_array(place) as (_, found):
        if found[1:] != shape:
            raise BadInput(f"{place} holds {_show(found)}, the model takes [images, {', '.join(map(str, shape))}]")
        # A compressed array is read from its beginning: it is one shard.
        step = found[0] if place.lower().endswith(".npz") else SHARD
        for start in range(0, found[0], step or 1):
            yield ArrayRows(place, start, min(step, found[0] - start), shape)


def _show(shape: Sequence[int]) -> str:
    return str(list(shape))
