"""Archives of other people: damaged, empty, of another kind, or larger than the memory."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from resnet.archives import check_size, read_arrays


def pack(**arrays: object) -> bytes:
    """Return the content of an .npz file."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def save(array: object) -> bytes:
    """Return the content of an .npy file."""
    file = io.BytesIO()
    np.save(file, array)  # type: ignore[arg-type]
    return file.getvalue()


def test_arrays_are_read_by_their_names(tmp_path: Path) -> None:
    """From a file, and from memory."""
    (tmp_path / "a.npz").write_bytes(pack(x=[1, 2], y="text"))
    for source in (tmp_path / "a.npz", io.BytesIO(pack(x=[1, 2], y="text"))):
        arrays = read_arrays(source)
        assert {name: array.tolist() for name, array in arrays.items()} == {"x": [1, 2], "y": "text"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a zip file"),
        (b"hello", "not a zip file"),
        (save([1, 2]), "not a zip file"),
        (pack(x=[1, 2])[:-30], "not a zip file"),
        (pack(x=np.zeros(100)).replace(b"NUMPY", b"MUMPY"), "Bad CRC-32|magic"),
        (pack(x=[{}]), "Object arrays cannot be loaded"),
    ],
    ids=["empty", "text", "npy", "cut", "damaged", "objects"],
)
def test_what_holds_no_arrays_is_a_value_error(tmp_path: Path, content: bytes, reason: str) -> None:
    """Whatever NumPy and zipfile raise; it says why."""
    (tmp_path / "a.npz").write_bytes(content)
    for source in (tmp_path / "a.npz", io.BytesIO(content)):
        with pytest.raises(ValueError, match=reason):
            read_arrays(source)


def test_arrays_come_from_regular_files_only(tmp_path: Path) -> None:
    """Others may never have an end."""
    os.mkfifo(tmp_path / "pipe.npz")
    for name in ("pipe.npz", "none.npz", "."):
        with pytest.raises(OSError, match=r"regular file|No such file|directory"):
            read_arrays(tmp_path / name)


@pytest.mark.parametrize("members", [(600, 401), (1001,)])
def test_an_archive_may_fill_the_memory_but_not_exceed_it(
    members: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All its members together; here the machine has 10 pages of 100 bytes."""
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for index, size in enumerate(members):
            archive.writestr(str(index), bytes(size))
    pages = {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 100}
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    with pytest.raises(ValueError, match="unpacks to 1e-06 GB, more than the 1e-06 GB of memory of this machine"):
        check_size(path)
    pages["SC_PAGE_SIZE"] = 101
    check_size(path)  # 1,010 bytes
    pages.update(SC_PHYS_PAGES=1001, SC_PAGE_SIZE=1)
    check_size(path)  # exactly as many as there are
