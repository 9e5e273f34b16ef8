"""A model repository in object storage, as commands see it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from export import manifest, remote, repository, triton
from resnet import BadInput, cli
from resnet.storage import StorageFolder
from tests.conftest import edit_manifest
from tests.remote import upload, write_complete

URL = "memory://bucket/models"


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[StorageFolder]:
    """It holds colors/1 to colors/3, and begins to hold colors/4."""
    for number in (1, 2, 3):
        upload(write_complete(tmp_path / "colors" / str(number)), URL)
    found = StorageFolder(URL)
    found.write("colors/4/labels.txt", b"red\n")
    yield found
    MemoryFileSystem.store.clear()


def call(*words: str) -> int:
    """Run a command."""
    return cli.main(list(words))


def test_complete_versions_are_listed(storage: StorageFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """In a repository, in a model, and in a bucket."""
    storage.write("colors/stable", b"2\n")
    storage.write("colors/notes", b"two\n")
    for place in (URL, f"{URL}/", f"{URL}/colors"):
        assert call("models", "list", place) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert [line.split()[0] for line in lines] == ["colors/1", "colors/2", "colors/3"]
        assert [line.endswith("stable") for line in lines] == [False, True, False]
    assert call("models", "list", "memory://bucket") == 2
    assert capsys.readouterr().err.startswith("resnet models: memory://bucket holds no models;")


def test_a_version_is_shown_with_the_size_of_its_files(
    storage: StorageFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of which only the manifest is read."""
    storage.remove(["colors/3/model.onnx"])
    storage.write("colors/3/model.onnx", bytes(5_000_000))
    assert call("models", "show", URL) == 0
    assert "  files      4, 5.0 MB" in capsys.readouterr().out


def test_labels_are_set_moved_and_removed(storage: StorageFolder) -> None:
    """A label is a file that holds a number."""
    assert call("models", "label", f"{URL}/colors", "stable", "1") == 0
    assert storage.read(["colors/stable"]) == {"colors/stable": b"1\n"}
    assert call("models", "label", URL, "stable", "3") == 0
    assert storage.read(["colors/stable"]) == {"colors/stable": b"3\n"}
    assert call("models", "label", URL, "stable", "4") == 2
    assert call("models", "label", URL, "stable") == 0
    assert "colors/stable" not in storage.list_files()


def test_old_versions_are_pruned(storage: StorageFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Labelled ones stay, and so does what another is writing."""
    storage.write("colors/stable", b"1")
    assert call("models", "prune", URL, "--keep", "1") == 0
    assert capsys.readouterr().out == "removed colors/2\n"
    kept = {name.split("/")[1] for name in storage.list_files()}
    assert kept == {"1", "3", "4", "stable"}


def test_a_version_is_verified(storage: StorageFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """Sentences name the URL, not the folder that it was downloaded to."""
    assert call("verify", f"{URL}/colors", "--version", "2") == 0
    assert capsys.readouterr().out.endswith("colors/2 is verified\n")
    content = storage.read(["colors/2/model.onnx"])["colors/2/model.onnx"]
    storage.write("colors/2/model.onnx", content[::-1])
    assert call("verify", f"{URL}/colors", "--version", "2") == 1
    assert "colors/2/model.onnx is not the file that was exported" in capsys.readouterr().err
    assert call("models", "verify", URL) == 1
    assert capsys.readouterr().err.endswith("not verified: colors/2; the reasons are above\n")
    assert call("verify", f"{URL}/colors", "--version", "9") == 2
    assert capsys.readouterr().err == f"resnet verify: {URL}/colors has no version 9; it has [1, 2, 3]\n"


def test_files_are_written_only_where_a_version_has_them(storage: StorageFolder, tmp_path: Path) -> None:
    """Whatever a manifest names."""
    version = tmp_path / "colors" / "3"
    edit_manifest(
        version, lambda content: content["files"].update({"../../outside": "0" * 64, "/tmp/outside": "0" * 64})
    )
    upload(version, URL)
    MemoryFileSystem.store["/bucket/models/colors/3/../../outside"] = MemoryFileSystem.store[
        "/bucket/models/colors/3/labels.txt"
    ]
    files = remote.sort_files(storage.list_files())["colors"].versions[3]
    with pytest.raises(Exception, match="colors/3 is not complete: files that its manifest names are missing"):
        remote.fetch(storage, "colors/3", files, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not (tmp_path / "outside").exists()


def publish(folder: Path, url: str) -> str:
    """Publish a version as an export does, and return its place."""
    with remote.check_out(url) as model, repository.staging(model.folder) as staged:

        def finish(number: int) -> None:
            shutil.copytree(folder, staged, dirs_exist_ok=True)
            edit_manifest(staged, lambda content: content.update(version=number))
            triton.write_files(manifest.parse(model.folder / str(number), manifest.read_content(staged)), model.folder)

        (staged / "labels.txt").write_bytes((folder / "labels.txt").read_bytes())
        return str(model.publish(staged, finish))


def test_a_version_is_published_under_the_next_number(storage: StorageFolder, tmp_path: Path) -> None:
    """Also beside one that another export is writing."""
    assert publish(tmp_path / "colors" / "3", f"{URL}/colors") == f"{URL}/colors/5"
    assert manifest.NAME in remote.sort_files(storage.list_files())["colors"].versions[5]
    assert call("models", "verify", URL) == 0
    assert {"colors/config.pbtxt", "colors/labels.txt"} <= storage.list_files().keys()


def test_of_two_exports_each_has_a_number_of_its_own(
    storage: StorageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though both have seen the same listing."""
    listing = storage.list_files()
    monkeypatch.setattr(
        StorageFolder, "list_files", lambda _: {name.removeprefix("colors/"): file for name, file in listing.items()}
    )
    places = [publish(tmp_path / "colors" / "3", f"{URL}/colors") for _ in range(2)]
    assert places == [f"{URL}/colors/5", f"{URL}/colors/6"]


def test_an_export_that_fails_leaves_nothing(
    storage: StorageFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the network does at the last moment."""
    before = storage.list_files().keys()

    def fail(*_: object) -> None:
        raise BadInput(f"{URL} cannot be written: Connection reset")

    monkeypatch.setattr(StorageFolder, "write", fail)
    with pytest.raises(BadInput, match="Connection reset"):
        publish(tmp_path / "colors" / "3", f"{URL}/colors")
    assert {name for name in storage.list_files() if "/5/" in name} == set()
    assert before <= storage.list_files().keys()


def test_a_folder_is_no_url(tmp_path: Path) -> None:
    """Everything is as it was."""
    with remote.check_out(str(tmp_path)) as model:
        assert model.folder == tmp_path
