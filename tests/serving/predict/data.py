"""The same ten images in every form that `resnet predict` reads: each of one colour, which the model names."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.versions import COLORS, SIDE

LABELS = [COLORS[number % 3] for number in range(10)]
PIXELS = np.zeros((len(LABELS), SIDE, SIDE, 3), np.uint8)
PIXELS[range(len(LABELS)), :, :, [COLORS.index(label) for label in LABELS]] = 200
BROKEN = 5  # the image that is no image in `write_broken`


def encode(pixels: np.ndarray) -> bytes:
    """Return a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


FILES = {f"{number:03}.png": encode(pixels) for number, pixels in enumerate(PIXELS)}


def write_folder(folder: Path, files: Mapping[str, bytes] = FILES) -> str:
    """Write image files, half of them in a folder of their own, each beside one that is none."""
    for at, (name, content) in enumerate(files.items()):
        path = folder / ("a" if at < len(files) // 2 else "b") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        path.with_suffix(".txt").write_text("red")
    (folder / ".hidden.png").write_bytes(b"")
    return str(folder)


def write_glob(folder: Path) -> str:
    """Write the same, and name it by a pattern."""
    return f"{write_folder(folder)}/*/*.png"


def write_tar(folder: Path, name: str = "images.tar", mode: str = "w") -> str:
    """Write a shard of a WebDataset, with a member beside each image, and one name that needs a header of its own."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, mode) as archive:
        for at, (inner, content) in enumerate(FILES.items()):
            stem = Path(inner).stem if at != 4 else "long" * 40
            for member, data in ((f"{stem}.png", content), (f"{stem}.cls", b"1")):
                info = tarfile.TarInfo(member)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    return str(folder / name)


def write_compressed_tar(folder: Path) -> str:
    """Write the same, compressed."""
    return write_tar(folder, "images.tar.gz", "w:gz")


def write_table(folder: Path, form: str = "bytes") -> str:
    """Write a table of files, of files as Hugging Face stores them, or of pixels."""
    pa = pytest.importorskip("pyarrow", reason="the extra 'predict' is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    columns = {
        "bytes": {"number": range(10), "image": pa.array(FILES.values(), pa.binary())},
        "structs": {"image": [{"bytes": content, "path": name} for name, content in FILES.items()]},
        "pixels": {"pixels": pa.array([one.tobytes() for one in PIXELS], pa.binary(PIXELS[0].nbytes))},
    }[form]
    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table(columns), folder / f"{form}.parquet", row_group_size=3)
    return str(folder / f"{form}.parquet")


def write_structs(folder: Path) -> str:
    """Write a table as Hugging Face does."""
    return write_table(folder, "structs")


def write_pixel_table(folder: Path) -> str:
    """Write a table of pixels."""
    return write_table(folder, "pixels")


def write_array(folder: Path) -> str:
    """Write pixels as an array."""
    folder.mkdir(exist_ok=True)
    np.save(folder / "images.npy", PIXELS)
    return str(folder / "images.npy")


def write_arrays(folder: Path) -> str:
    """Write pixels as one of several compressed arrays."""
    folder.mkdir(exist_ok=True)
    np.savez_compressed(folder / "images.npz", labels=np.zeros(10), images=PIXELS)
    return str(folder / "images.npz")


SOURCES: list[Callable[[Path], str]] = [
    write_folder,
    write_glob,
    write_tar,
    write_compressed_tar,
    write_array,
    write_arrays,
]
TABLES: list[Callable[[Path], str]] = [write_table, write_structs, write_pixel_table]
