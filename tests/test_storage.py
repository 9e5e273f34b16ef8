"""Files in object storage, and what is said when there is none."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from resnet import BadInput
from resnet.storage import StorageFolder, is_url


@pytest.fixture
def folder() -> Iterator[StorageFolder]:
    """An empty one, in memory."""
    yield StorageFolder("memory://bucket/models/")
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("place", ["s3://bucket/models", "hf://user/models", "S3://b"])
def test_urls_have_a_scheme(place: str) -> None:
    """And paths have none, however odd."""
    assert is_url(place)
    assert not is_url(Path(place))
    assert not is_url(f"./{place}")


def test_files_are_written_listed_read_and_removed(folder: StorageFolder, tmp_path: Path) -> None:
    """By their paths inside the folder; those outside of it are not seen."""
    (tmp_path / "a").write_bytes(b"one")
    folder.upload({"digits/1/a": tmp_path / "a"})
    folder.write("b", b"two")
    StorageFolder("memory://bucket/models2").write("c", b"three")
    assert {name: file.size for name, file in folder.list_files().items()} == {"digits/1/a": 3, "b": 3}
    assert folder.read(["b", "digits/1/a"]) == {"b": b"two", "digits/1/a": b"one"}
    folder.download({"digits/1/a": tmp_path / "new" / "b"})
    assert (tmp_path / "new" / "b").read_bytes() == b"one"
    folder.remove(["b"])
    assert [*folder.list_files()] == ["digits/1/a"]


def test_a_file_that_changes_has_another_tag(folder: StorageFolder) -> None:
    """And one that does not has the same."""
    folder.write("a", b"one")
    before = folder.list_files()
    assert folder.list_files() == before
    folder.write("a", b"two")
    assert folder.list_files() != before


def test_a_file_is_created_once(folder: StorageFolder) -> None:
    """Whoever comes second is told, and changes nothing."""
    assert folder.create("a", b"one")
    assert not folder.create("a", b"two")
    assert folder.read(["a"]) == {"a": b"one"}


def test_names_that_lead_outside_are_left_out(folder: StorageFolder) -> None:
    """Object storage allows any name."""
    folder.write("good", b"")
    for name in ("digits/1/../../../x", "../x", "a//b", "./c"):
        MemoryFileSystem.store[f"/bucket/models/{name}"] = MemoryFileSystem.store["/bucket/models/good"]
    assert [*folder.list_files()] == ["good"]


@pytest.mark.parametrize(
    ("url", "missing", "sentence"),
    [
        ("xyz://a/b", "", "xyz:// is no scheme that fsspec knows; use a path, s3://, gs://, az:// or hf://"),
        ("s3://", "", "s3:// names no bucket; write it as s3://bucket/models"),
        ("s3://a/b", "s3fs", "its driver is not installed; run pip install 'resnet[storage]'"),
        ("gs://a/b", "gcsfs", "its driver is not installed; run pip install gcsfs"),
        ("az://a/b", "adlfs", "its driver is not installed; run pip install adlfs"),
        ("hf://a/b", "huggingface_hub", "its driver is not installed; run pip install huggingface_hub"),
        ("memory://a/b", "fsspec.core", "its driver is not installed; run pip install 'resnet[storage]'"),
    ],
)
def test_what_cannot_be_opened_is_said(url: str, missing: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do."""
    if missing:
        registry = importlib.import_module("fsspec.registry")
        monkeypatch.delitem(registry._registry, url.partition(":")[0], raising=False)  # if it was found before
        monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput) as caught:
        StorageFolder(url)
    assert str(caught.value).endswith(sentence)


def test_an_error_of_the_local_disk_is_none_of_the_storage(folder: StorageFolder, tmp_path: Path) -> None:
    """Whoever downloads knows what to do."""
    folder.write("a", b"one")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        folder.download({"a": tmp_path / "file" / "a"})
    with pytest.raises(BadInput, match="memory://bucket/models cannot be read: there is no such bucket or file"):
        folder.read(["b"])


def test_a_password_is_not_shown() -> None:
    """In no sentence, and in no name of a folder."""
    with pytest.raises(BadInput, match=r"^x3://\*\*\*@example.org/models cannot be opened") as failure:
        StorageFolder("x3://user:secret@example.org/models")
    assert "secret" not in str(failure.value)
