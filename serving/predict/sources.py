"""What there is to predict, cut into shards: of image files, tar archives, Parquet tables, and arrays of pixels.

A shard is read on its own, in order, wherever it is computed. The images in it are the same whenever it is read.
"""

from __future__ import annotations

import gzip
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, NamedTuple, Protocol, Self, cast

import numpy as np

from resnet import BadInput
from resnet.storage import is_url
from serving.predict import places
from serving.predict.decoder import FileContents
from serving.predict.places import DataFile, UnreadableFile
from serving.runtimes.base import Images

SHARD = 2048  # images: seconds of work, and many batches
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")  # all but the first three become errors
TARS, ARRAYS, TABLES = (".tar", ".tar.gz", ".tgz"), (".npy", ".npz"), (".parquet", ".pq")
NO_PARQUET = "{} needs pyarrow; install resnet with its extra 'predict' (pip install 'resnet[predict]')"
READ_AT_ONCE = 128  # files of object storage, each of which takes tens of milliseconds
DAMAGED = (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error)
GZIP = b"\x1f\x8b"  # its first bytes

ImageShape = tuple[int, int, int]
"""Height, width and 3."""


class ImageChunk(NamedTuple):
    """Consecutive images of a shard.

    Attributes:
        keys: Their paths, or other names.
        images: Pixels, uint8 [n, height, width, channels], or files.
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
    found = (places.find(place, lambda name: bool(_find_ending(name))) for place in data)
    return [file for files in found for file in dict.fromkeys(files)]  # a glob may match a folder and files in it


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
            continue
        for file in group:
            try:
                shards += _cut(file, shape, column)
            except UnreadableFile as error:
                if len(files) == 1:
                    raise
                shards.append(RestOfFile(file.place, _find_reason(file.place, error)))
    return shards


def _cut(file: DataFile, shape: ImageShape, column: str | None) -> list[Shard]:
    ending = _find_ending(file.place)
    if ending is TARS:
        return list(_cut_tar(file))
    return list(_cut_array(file.place, shape) if ending is ARRAYS else _cut_table(file.place, shape, column))


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
class RestOfFile:
    """What cannot be read of a file: one image that is an error."""

    encoded: ClassVar = False
    images: ClassVar = 1
    place: str
    reason: str

    def read(self, step: int) -> Iterator[ImageChunk]:  # noqa: ARG002  # it is one
        """Yield the error."""
        yield ImageChunk([self.place], [EOFError(self.reason)])


def _find_reason(place: str, error: UnreadableFile) -> str:
    return str(error).removeprefix(f"{place} ")  # a row has it already


@dataclass(frozen=True)
class TarMembers:
    """Image files in an archive, such as a shard of a WebDataset: so many from a byte on, or the rest of them."""

    encoded: ClassVar = True
    place: str
    start: int
    images: int | None

    def read(self, step: int) -> Iterator[ImageChunk]:
        """Yield them; what is no image is left out, and the rest of a damaged archive is one that cannot be read."""
        keys, contents = list[str](), list[bytes | Exception]()
        with places.open_place(self.place) as file:
            is_gzip = self.start == 0 and file.read(len(GZIP)) == GZIP
            file.seek(self.start)
            # tarfile itself checks no checksum of gzip's, and ends at the first of several streams.
            source = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_gzip else file
            try:
                with tarfile.open(fileobj=source, mode="r|*", tarinfo=_Member) as archive:
                    for member in islice(filter(_is_image, archive), self.images):
                        contents.append(_read_member(archive, member))
                        keys.append(f"{self.place}/{member.name}")
                        _forget(archive)
                        if len(keys) == step:
                            yield ImageChunk(keys, contents)
                            keys, contents = [], []
            except DAMAGED as error:
                keys, contents = [*keys, self.place], [*contents, error]
        if keys:
            yield ImageChunk(keys, contents)


class _Member(tarfile.TarInfo):
    """A member of an archive; a damaged header is an error, for which tarfile only ends."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # zeros: the mark of the end
            source = cast(BinaryIO, archive.fileobj)
            while rest := source.read(tarfile.RECORDSIZE):
                if any(rest):
                    raise tarfile.ReadError("there is more after the mark of its end") from None
            raise
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("the archive is cut: the mark of its end is missing") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"a header is damaged: {error}") from None


def _is_image(member: tarfile.TarInfo) -> bool:
    name = member.name.lower()
    return not member.isdir() and name.endswith(IMAGES) and not PurePosixPath(name).name.startswith(".")


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | Exception:
    if not member.isfile():
        what = f"a link to {member.linkname}" if member.islnk() or member.issym() else "no file"
        return tarfile.ExtractError(f"it is {what}; put the image itself into the archive")
    content = archive.extractfile(member)
    return content.read() if content else b""


def _cut_tar(file: DataFile) -> Iterator[TarMembers]:
    """Yield the shards of an archive: one if it is compressed or would have to be fetched to be cut.

    How many images are in the rest of a damaged one is not known; it ends with an error.
    """
    start, images = 0, None
    if not is_url(file.place) and file.place.lower().endswith(".tar"):
        with places.open_place(file.place) as opened:
            try:
                with tarfile.open(fileobj=opened, mode="r:", tarinfo=_Member) as archive:
                    images = 0
                    for member in archive:
                        if images == SHARD:
                            yield TarMembers(file.place, start, images)
                            start, images = member.offset, 0
                        images += _is_image(member)
                        _forget(archive)
            except DAMAGED:
                images = None
    yield TarMembers(file.place, start, images)


def _forget(archive: tarfile.TarFile) -> None:
    """Free the headers that were read, so that memory does not grow with the archive."""
    archive.members = []  # type: ignore[attr-defined]


@dataclass(frozen=True)
class ArrayRows:
    """Rows of an array of pixels: of an .npy file, or the array `images` of an .npz file."""

    encoded: ClassVar = False
    place: str
    start: int
    images: int
    shape: ImageShape

    def read(self, step: int) -> Iterator[ImageChunk]:
        """Yield them; the rest of a damaged array is one that cannot be read."""
        size = int(np.prod(self.shape))
        try:
            with _open_array(self.place) as (file, _):
                file.seek(self.start * size, os.SEEK_CUR)
                for row in range(self.start, self.start + self.images, step):
                    count = min(step, self.start + self.images - row)
                    content = file.read(count * size)
                    whole = len(content) // size
                    keys = [f"{self.place}#{number}" for number in range(row, row + whole)]
                    if whole:
                        yield ImageChunk(keys, np.frombuffer(content, np.uint8, whole * size).reshape(-1, *self.shape))
                    if whole < count:
                        raise UnreadableFile(f"it ends before #{row + whole}")
        except UnreadableFile as error:
            yield from RestOfFile(self.place, _find_reason(self.place, error)).read(step)


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
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UnreadableFile(f"{place} is no array of pixels, or is damaged ({error})") from None


@contextmanager
def _open_member(file: BinaryIO) -> Iterator[BinaryIO]:
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        with archive.open(names[0] if len(names) == 1 else "images.npy") as member:
            yield cast(BinaryIO, member)


def _cut_array(place: str, shape: ImageShape) -> Iterator[Shard]:
    with _open_array(place) as (file, found):
        if found[1:] != shape:
            raise BadInput(f"{place} holds {_show(found)}, the model takes [images, {', '.join(map(str, shape))}]")
        if place.lower().endswith(".npz"):  # compressed arrays are read from the beginning: each is one shard
            yield ArrayRows(place, 0, found[0], shape)
            return
        start = file.tell()
        rows = min(found[0], (file.seek(0, os.SEEK_END) - start) // int(np.prod(shape)))
        for row in range(0, rows, SHARD):
            yield ArrayRows(place, row, min(SHARD, rows - row), shape)
        if rows < found[0]:
            yield RestOfFile(place, f"it holds {rows} of {found[0]} images")


def _show(shape: Sequence[int]) -> str:
    return str(list(shape))
