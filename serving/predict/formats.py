"""Answers as rows of CSV, JSON lines and Parquet. Each shard is a piece; all pieces in order are the file."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Protocol

import msgspec
import numpy as np

from resnet import BadInput
from serving.predict.predictor import ImageAnswers
from serving.predict.sources import NO_PARQUET
from serving.protocols.outputs import find_top

DECIMALS = 7  # of probabilities in text, as many as float32 has
ROWS = 2**16  # in a row group of Parquet, or a few more


@dataclass(frozen=True)
class RowLayout:
    """The columns of the answers.

    Attributes:
        model: Name and version of the model.
        labels: Its classes.
        top_k: So many classes of each image, the most probable first.
        all: The probabilities of all classes, in the order of `labels`, in place of those.
    """

    model: str
    labels: Sequence[str]
    top_k: int
    all: bool

    @property
    def columns(self) -> list[str]:
        """Their names."""
        several = ["probabilities"] if self.all else ["labels", "probabilities"] if self.top_k > 1 else []
        return ["path", "label", "probability", *several, "error"]

    def list_rows(self, answers: ImageAnswers, exact: bool) -> Iterator[tuple[Any, ...]]:
        """Yield a row for each image; one that could not be read has None in place of an answer.

        Args:
            answers: The answers.
            exact: Give probabilities as they are, not rounded to `DECIMALS`.
        """
        several = self.top_k > 1  # to sort the classes takes longer than to find the first
        top = find_top(answers.probabilities, self.top_k) if several else answers.probabilities.argmax(1)[:, None]
        found = np.take_along_axis(answers.probabilities, top, axis=1).astype(np.float64)
        every = answers.probabilities.astype(np.float64) if self.all else found
        if not exact:
            found, every = found.round(DECIMALS), every.round(DECIMALS)
        names = [[self.labels[at] for at in row] for row in top.tolist()]
        cells: list[Sequence[Any]] = [[row[0] for row in names], found[:, 0].tolist()]
        cells += [every.tolist()] if self.all else [names, found.tolist()] if several else []
        computed = zip(*cells, strict=True)
        nothing = (None,) * len(cells)
        for at, key in enumerate(answers.keys):
            path = key if key.isascii() else key.encode("utf-8", "backslashreplace").decode()  # any bytes may be names
            error = answers.errors.get(at)
            yield (path, *(next(computed) if error is None else nothing), error)


class OutputFormat(Protocol):
    """A kind of file for answers."""

    exact: bool
    """Whether it keeps probabilities as they are."""

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> bytes:
        """Return the piece of a shard."""
        ...

    def merge(self, pieces: Iterable[Path], file: BinaryIO) -> None:
        """Write the file that the pieces make."""
        ...


class CsvFormat:
    """Comma-separated values with a header; without lists: further classes have columns of their own."""

    exact = False

    def __init__(self, layout: RowLayout) -> None:
        further = range(2, layout.top_k + 1)
        ranked = [name for rank in further for name in (f"label_{rank}", f"probability_{rank}")]
        self._header = ["path", "label", "probability", *(layout.labels if layout.all else ranked), "error"]
        self._all = layout.all

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> bytes:
        """Return the rows."""
        return self._write(map(self._flatten, rows))

    def merge(self, pieces: Iterable[Path], file: BinaryIO) -> None:
        """Write the header and all rows."""
        file.write(self._write([self._header]))
        _append(pieces, file)

    def _flatten(self, row: tuple[Any, ...]) -> Sequence[Any]:
        path, label, probability, *several, error = row
        if label is None:
            return [path, *[None] * (len(self._header) - 2), error]
        further = several[0] if self._all else []
        if several and not self._all:
            further = [cell for pair in zip(*(cells[1:] for cells in several), strict=True) for cell in pair]
        return [path, label, probability, *further, error]

    def _write(self, rows: Iterable[Sequence[Any]]) -> bytes:
        text = io.StringIO()
        plain = csv.writer(text, lineterminator="\n")
        quoted = csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL)
        for row in rows:
            # Readers end a line at a carriage return, and Python's writer quotes only those of its own line ends.
            (quoted if "\r" in f"{row[0]}{row[-1]}" else plain).writerow(row)
        return text.getvalue().encode()


class JsonLinesFormat:
    """One JSON object a line."""

    exact = False

    def __init__(self, layout: RowLayout) -> None:
        self._columns = layout.columns

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> bytes:
        """Return the lines."""
        encode = msgspec.json.encode
        return b"".join(encode(dict(zip(self._columns, row, strict=True))) + b"\n" for row in rows)

    def merge(self, pieces: Iterable[Path], file: BinaryIO) -> None:
        """Write all lines."""
        _append(pieces, file)


class ParquetFormat:
    """A table; its metadata name the model and, as JSON, its classes."""

    exact = True

    def __init__(self, layout: RowLayout) -> None:
        try:
            import pyarrow as pa
            import pyarrow.parquet as pq
        except ModuleNotFoundError:
            raise BadInput(NO_PARQUET.format("--to FILE.parquet")) from None
        kinds = {"probability": pa.float32(), "labels": pa.list_(pa.string()), "probabilities": pa.list_(pa.float32())}
        metadata = {"model": layout.model, "labels": msgspec.json.encode(layout.labels)}
        self._pa, self._pq = pa, pq
        self._schema = pa.schema([(name, kinds.get(name, pa.string())) for name in layout.columns], metadata)

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> bytes:
        """Return a file of the rows."""
        columns = list(zip(*rows, strict=True))
        arrays = [self._pa.array(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        sink = self._pa.BufferOutputStream()
        self._pq.write_table(self._pa.table(arrays, schema=self._schema), sink)
        return bytes(sink.getvalue())

    def merge(self, pieces: Iterable[Path], file: BinaryIO) -> None:
        """Write one file, with row groups that are larger than the pieces."""
        waiting: list[Any] = []
        with self._pq.ParquetWriter(file, self._schema) as writer:
            for piece in pieces:
                waiting.append(self._pq.read_table(piece))
                if sum(map(len, waiting)) >= ROWS:
                    writer.write_table(self._pa.concat_tables(waiting))
                    waiting = []
            if waiting:
                writer.write_table(self._pa.concat_tables(waiting))


def _append(pieces: Iterable[Path], file: BinaryIO) -> None:
    for path in pieces:
        with path.open("rb") as piece:
            shutil.copyfileobj(piece, file)


FORMATS: Mapping[str, Callable[[RowLayout], OutputFormat]] = {
    ".csv": CsvFormat,
    ".jsonl": JsonLinesFormat,
    ".parquet": ParquetFormat,
}


def find_format(to: str, layout: RowLayout) -> OutputFormat:
    """Return the format that the ending of a file stands for.

    Raises:
        BadInput: There is none, or its package is not installed.
    """
    suffix = PurePosixPath(to).suffix
    if suffix not in FORMATS:
        raise BadInput(f"--to {to}: the ending must be one of {', '.join(FORMATS)}")
    return FORMATS[suffix](layout)
