"""What is found and read of data that are damaged, odd, or oddly named."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnet import BadInput
from serving.predict import places, sources
from serving.predict.sources import ImageShape
from tests.serving.predict import data

BLOCK = tarfile.BLOCKSIZE
SHAPE: ImageShape = data.PIXELS.shape[1:]


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of four images, so that ten make three."""
    monkeypatch.setattr(sources, "SHARD", 4)


def read(*names: object) -> tuple[list[str], dict[str, str]]:
    """Return the names of the images that were read, without folders, and the errors of the others."""
    images, errors = list[str](), dict[str, str]()
    for shard in sources.find_shards(sources.find_files(map(str, names)), SHAPE):
        for keys, contents in shard.read(3):
            for key, content in zip(keys, contents, strict=True):
                name = key.rpartition("/")[2]
                if isinstance(content, Exception):
                    errors[name] = str(content)
                else:
                    images.append(name)
    return images, errors


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Ten images in an archive, each in a block after its header."""
    with tarfile.open(tmp_path / "images.tar", "w") as file:
        for name, content in data.FILES.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return tmp_path / "images.tar"


def flip(content: bytes, at: int) -> bytes:
    """Return bytes with one that is another."""
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "kept", "reason"),
    [
        (lambda content: flip(content, 12 * BLOCK), 6, "a header is damaged: bad checksum"),
        (lambda content: content[: 12 * BLOCK], 6, "the archive is cut"),
        (lambda content: content[: 16 * BLOCK], 8, "the archive is cut"),
        (lambda content: content[: 12 * BLOCK + 20], 6, "a header is damaged: truncated header"),
        (lambda content: content[: 20 * BLOCK], 10, "the archive is cut"),
        (lambda content: content + content, 10, "there is more after the mark of its end"),
        (lambda _: b"no archive", 0, "a header is damaged: truncated header"),
        (lambda content: content, 10, ""),
    ],
)
@pytest.mark.parametrize("is_compressed", [False, True])
def test_the_rest_of_a_damaged_archive_is_never_lost_in_silence(
    damage: Callable[[bytes], bytes], kept: int, reason: str, is_compressed: bool, archive: Path
) -> None:
    """At the border of a shard, and within it."""
    content = damage(archive.read_bytes())
    archive.write_bytes(content)
    if is_compressed:
        archive = archive.with_suffix(".tar.gz")
        archive.write_bytes(gzip.compress(content, 1))
    images, errors = read(archive)
    assert images == list(data.FILES)[:kept]
    assert list(errors) == [archive.name] * bool(reason)
    assert all(error.startswith(reason) for error in errors.values())


@pytest.mark.parametrize("name", ["images.tar", "images.tgz"])
def test_compressed_archives_are_known_by_their_content_and_checked(name: str, archive: Path) -> None:
    """Whatever their names are; of several streams all are read."""
    content, place = archive.read_bytes(), archive.with_name(name)
    compressed = gzip.compress(content[: 5 * BLOCK]) + gzip.compress(content[5 * BLOCK :])
    place.write_bytes(compressed)
    assert read(place) == (list(data.FILES), {})
    place.write_bytes(flip(compressed, len(compressed) - 8))
    images, errors = read(place)
    assert images == list(data.FILES)
    assert "CRC" in errors[name]


def test_links_in_an_archive_are_errors(archive: Path) -> None:
    """If they have the ending of an image."""
    with tarfile.open(archive, "a") as file:
        for name, kind in (("hard.png", tarfile.LNKTYPE), ("soft.png", tarfile.SYMTYPE), ("soft.cls", tarfile.SYMTYPE)):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "000.png"
            file.addfile(link)
        folder = tarfile.TarInfo("folder.png")
        folder.type = tarfile.DIRTYPE
        file.addfile(folder)
    images, errors = read(archive)
    assert images == list(data.FILES)
    assert errors == dict.fromkeys(
        ("hard.png", "soft.png"), "it is a link to 000.png; put the image itself into the archive"
    )


def test_odd_entries_of_a_folder_stop_nothing(archive: Path) -> None:
    """Those without an ending of data are not looked at; archives and arrays that cannot be read are errors."""
    folder = archive.parent
    for name in ("notes.txt", "lost.png", "lost.tar"):
        (folder / name).symlink_to("nowhere")
    (folder / "self").symlink_to("self")
    (folder / "again").symlink_to(".")
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "pipe.tar")
    (folder / "bad.npz").write_bytes(b"bad")
    images, errors = read(folder)
    assert images == [*data.FILES, "lost.png"]  # which is an error where it is decoded
    assert set(errors) == {"bad.npz", "lost.tar", "pipe.tar"}
    assert errors["lost.tar"] == "is a link to nothing"
    with pytest.raises(BadInput, match=r"lost.png is a link to nothing"):
        read(folder / "lost.png")
    with pytest.raises(BadInput, match=r"bad.npz is no array of pixels"):
        read(folder / "bad.npz")


def test_a_pattern_that_matches_nothing_is_named(archive: Path) -> None:
    """Beside other data too."""
    with pytest.raises(BadInput, match=r"none\*.png matches no file"):
        read(archive, archive.parent / "none*.png")


def test_arrays_that_are_cut_keep_their_whole_images(tmp_path: Path) -> None:
    """And are one error, however many shards are missing."""
    place = Path(data.write_array(tmp_path))
    place.write_bytes(place.read_bytes()[: -8 * data.PIXELS[0].nbytes - 1])
    assert read(place) == (["images.npy#0"], {"images.npy": "it holds 1 of 10 images"})


def test_compressed_arrays_that_are_damaged_are_errors(tmp_path: Path) -> None:
    """Which are found as they are read."""
    place = tmp_path / "images.npz"
    np.savez(place, images=np.tile(data.PIXELS, (200, 1, 1, 1)))
    content = place.read_bytes()
    place.write_bytes(flip(content, len(content) // 2))
    images, errors = read(place)
    assert 0 < len(images) < 2000
    assert "Bad CRC-32" in errors["images.npz"]


@pytest.mark.slow  # to import pyarrow takes a second
def test_rows_without_pixels_are_errors(tmp_path: Path) -> None:
    """Not black images."""
    pa = pytest.importorskip("pyarrow", reason="the extra 'predict' is not installed")
    rows = [None if at in (1, 2, 9) else one.tobytes() for at, one in enumerate(data.PIXELS)]
    table = pa.table({"pixels": pa.array(rows, pa.binary(data.PIXELS[0].nbytes))})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "some.parquet")
    pixels = list[Any]()
    errors = list[str]()
    for shard in sources.find_shards(sources.find_files([str(tmp_path)]), SHAPE):
        for keys, images in shard.read(4):
            if isinstance(images, np.ndarray):
                pixels += list(images)
            else:
                errors += keys
    assert errors == [f"{tmp_path}/some.parquet#{row}" for row in (1, 2, 9)]
    assert np.array_equal(pixels, data.PIXELS[[0, 3, 4, 5, 6, 7, 8]])


@pytest.fixture
def memory() -> Iterator[Any]:
    """Object storage."""
    system = pytest.importorskip("fsspec", reason="the extra 'storage' is not installed").filesystem("memory")
    yield system
    system.rm("/", recursive=True)


def test_objects_are_not_taken_for_patterns(memory: Any) -> None:
    """Nor are hidden ones found by one."""
    names = ["a[1].png", "a1.png", "b*?.png"]
    memory.pipe({f"/odd/{name}": name.encode() for name in (*names, ".hidden.png", ".cache/c.png")})
    found = sources.find_files(["memory://odd"])
    assert places.read_all([file.place for file in found]) == [name.encode() for name in sorted(names)]
    assert read("memory://odd/*.png")[0] == sorted(names)
    assert read("memory://odd/**/*.png")[0] == sorted(names)
    assert read("memory://odd/.h*")[0] == [".hidden.png"]
    assert read("memory://odd/a[1].png")[0] == ["a[1].png"]
    with pytest.raises(BadInput, match=r"memory://odd/none\* matches no file"):
        read("memory://odd/none*")


def test_a_glob_of_folders_and_their_files_names_each_once(tmp_path: Path) -> None:
    """In the order in which it matches."""
    place = data.write_folder(tmp_path / "data")
    once = sources.find_files([place])
    assert len(once) == len(data.LABELS)
    assert sorted(sources.find_files([f"{place}/**"])) == sorted(once)
