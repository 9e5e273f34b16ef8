"""ZIP archives that other people made: .npz files of arrays, and .keras files."""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from resnet.files import open_regular

UNREADABLE = (ValueError, KeyError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error)


def read_arrays(file: Path | io.BytesIO) -> dict[str, NDArray[Any]]:
    """Return the arrays of an .npz file by their names. It can run no code: pickled objects are refused.

    Raises:
        OSError: The file cannot be opened, or is no regular file.
        ValueError: It is no .npz file, is damaged, holds objects, or unpacks to more than the memory of this machine.
    """
    with open_regular(file) if isinstance(file, Path) else nullcontext(file) as opened:
        try:
            check_size(opened)
            opened.seek(0)
            with np.load(opened, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except UNREADABLE as error:
            raise ValueError(str(error) or type(error).__name__) from None


def check_size(file: IO[bytes] | Path) -> None:
    """Check that the content of a ZIP archive fits in the memory of this machine.

    Raises:
        BadZipFile: It is no such archive.
        ValueError: It does not fit.
    """
    with zipfile.ZipFile(file) as archive:
        size = sum(member.file_size for member in archive.infolist())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"it unpacks to {size / 1e9:,.3g} GB, more than the {memory / 1e9:,.3g} GB of memory of this machine"
        )
