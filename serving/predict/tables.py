"""Parquet tables of images: files, also as Hugging Face stores them, or pixels. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from math import prod

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from resnet import BadInput
from resnet.storage import is_url
from serving.predict import places
from serving.predict.places import UnreadableFile
from serving.predict.sources import ImageChunk, ImageShape

COLUMNS = ("image", "images", "img", "jpg", "jpeg", "png")  # which one to read, of several columns of bytes
KEYS = ("path", "key", "__key__", "id", "file_name", "filename")  # columns that name the images
BUFFER_BYTES = 2**20  # of a file: without it a whole row group is in memory, which may be the file


@dataclass(frozen=True)
class TableRows:
    """Rows of a Parquet file: some of its row groups.

    Attributes:
        place: The file.
        groups: The row groups.
        first: Number of the first row.
        images: Number of rows.
        column: The column of the images.
        encoded: Whether it holds image files, as bytes or as a struct of `bytes` and `path`; pixels are bytes of a
            fixed size.
        key: Column with the names of the images; without one they are FILE#ROW.
        shape: Of pixels.
    """

    place: str
    groups: tuple[int, ...]
    first: int
    images: int
    column: str
    encoded: bool
    key: str | None
    shape: ImageShape

    def read(self, step: int) -> Iterator[ImageChunk]:
        """Yield the images of the rows; the rest of a damaged file is one that cannot be read."""
        with _open(self.place) as table:
            try:
                yield from self._read(table, step)
            except (pa.ArrowException, OSError) as error:  # Arrow has both for damage
                if isinstance(error, OSError) and is_url(self.place):
                    raise  # it may be read later
                yield ImageChunk([self.place], [error])

    def _read(self, table: ParquetFile, step: int) -> Iterator[ImageChunk]:
        row = self.first
        columns = [self.column] if self.key is None else [self.column, self.key]
        for batch in table.iter_batches(step, self.groups, columns):
            keys = [f"{self.place}#{number}" for number in range(row, row + len(batch))]
            row += len(batch)
            column = batch.column(self.column)
            names = batch.column(self.key) if self.key is not None else None
            if pa.types.is_struct(column.type):
                names = column.field("path") if "path" in column.type.names else names
                column = column.field("bytes")
            if names is not None:
                keys = [key if name is None else str(name) for name, key in zip(names.to_pylist(), keys, strict=True)]
            if pa.types.is_fixed_size_binary(column.type):
                yield from self._list_pixels(keys, column)
            else:
                yield ImageChunk(keys, [content or b"" for content in column.to_pylist()])

    def _list_pixels(self, keys: Sequence[str], column: pa.Array) -> Iterator[ImageChunk]:
        """Yield the rows of a column of pixels; those without a value are errors."""
        is_valid, start = column.is_valid().to_pylist(), 0
        for valid, group in groupby(is_valid):
            rows = slice(start, start + len(list(group)))
            start = rows.stop
            if valid:
                pixels = np.frombuffer(column.buffers()[1], np.uint8).reshape(-1, *self.shape)
                yield ImageChunk(keys[rows], pixels[column.offset :][rows])
            else:
                yield ImageChunk(keys[rows], [ValueError("the row has no image")] * len(keys[rows]))


def cut(place: str, shape: ImageShape, rows: int, column: str | None) -> Iterator[TableRows]:
    """Yield the shards of a file: row groups of about so many rows together, at least one.

    Raises:
        BadInput: It cannot be read, or has no column that the model can take.
    """
    with _open(place) as table:
        schema = table.schema_arrow
        chosen = _choose_column(place, schema, shape, column)
        key = next((name for name in KEYS if name in schema.names and name != chosen), None)
        encoded = not pa.types.is_fixed_size_binary(_find_bytes(schema.field(chosen).type))
        first, images, groups = 0, 0, list[int]()
        for group in range(table.metadata.num_row_groups):
            found = table.metadata.row_group(group).num_rows
            if groups and images + found > rows:
                yield TableRows(place, tuple(groups), first, images, chosen, encoded, key, shape)
                first, images, groups = first + images, 0, []
            images, groups = images + found, [*groups, group]
        if images:
            yield TableRows(place, tuple(groups), first, images, chosen, encoded, key, shape)


@contextmanager
def _open(place: str) -> Iterator[ParquetFile]:
    with places.open_place(place) as file:
        try:
            table = ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False)
        except pa.ArrowException as error:
            raise UnreadableFile(f"{place} is no Parquet file, or is damaged ({error}); write it again") from None
        yield table


def _choose_column(place: str, schema: pa.Schema, shape: ImageShape, wanted: str | None) -> str:
    """Return the name of the column that holds the images.

    Raises:
        BadInput: There is none, or several and none with a usual name; or pixels have another size.
    """
    found = [field.name for field in schema if _holds_bytes(field.type)]
    chosen: Sequence[str] = [name for name in found if name in (wanted, *COLUMNS)] if wanted is None else [wanted]
    if not found or (wanted is not None and wanted not in found):
        which = "no column of image bytes" if wanted is None else f"no column {wanted!r} of image bytes"
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise BadInput(f"{place} has {which}; its columns are {columns}")
    if len(found) == 1:
        chosen = found
    if len(chosen) != 1:
        raise BadInput(f"{place} has several columns of bytes ({', '.join(found)}); choose one with --column")
    kind = schema.field(chosen[0]).type
    if pa.types.is_fixed_size_binary(kind) and kind.byte_width != prod(shape):
        raise BadInput(
            f"{place} has {kind.byte_width} bytes of pixels in each row, the model takes {prod(shape)}: "
            f"{' x '.join(map(str, shape))}"
        )
    return chosen[0]


def _holds_bytes(kind: pa.DataType) -> bool:
    kind = _find_bytes(kind)
    tests = pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary
    return any(test(kind) for test in tests)


def _find_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type of the bytes in a column, which may be in a struct."""
    return kind.field("bytes").type if pa.types.is_struct(kind) and "bytes" in kind.names else kind
